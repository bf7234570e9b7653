// Screenshots of the panels for docs/panels.md, from a running ComfyUI with the toy world's files (see panel_pictures.py).
// node panel_pictures.mjs URL CHROMIUM FOLDER_WITH_NODE_MODULES OUTPUT

import { createRequire } from "node:module";
import path from "node:path";

const [url, executablePath, tools, output] = process.argv.slice(2);
const { chromium } = createRequire(path.join(path.resolve(tools), "x.js"))("playwright-core");
const TOY = { UNETLoader: ["toy_wan_t2v.safetensors"], VAELoader: ["toy_wan_vae.safetensors"], CLIPLoader: ["toy_umt5.safetensors"] };
const SIZE = { width: 64, height: 64, length: 17 };
const PROMPT = "a red ball in a wood room, fast orbit";

const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
const page = await browser.newPage({ viewport: { width: 1680, height: 1000 }, deviceScaleFactor: 1.5 });
await page.goto(url);
await page.waitForFunction(() => window.comfyAPI?.app?.app?.rootGraph && document.getElementById("intrinsic-reward-style"));
await page.evaluate(() => { window.ir = window.comfyAPI.app.app; });
await page.waitForTimeout(1500);
await page.evaluate(() => window.ir.extensionManager.setting.set("Comfy.VueNodes.Enabled", false));
await page.keyboard.press("Escape");

async function open(name) {
  await page.evaluate(async (template) => {
    const { api } = window.comfyAPI.api;
    const pack = (await (await api.fetchApi("/workflow_templates")).json());
    const folder = Object.keys(pack).find((key) => pack[key].includes(template));
    const json = await (await api.fetchApi(`/workflow_templates/${folder}/${encodeURIComponent(template)}.json`)).json();
    await window.ir.loadGraphData(json, true, true, template);
  }, name);
}

async function run(name, widgets = {}) {
  await open(name);
  await page.evaluate(async ([toy, size, prompt, more]) => {
    const { api } = window.comfyAPI.api;
    for (const node of window.ir.graph.nodes) {
      (node.widgets ?? []).forEach((w, i) => {
        if (toy[node.type] && i === 0) [w.value] = toy[node.type];
        if (node.type === "EmptyHunyuanLatentVideo" && w.name in size) w.value = size[w.name];
        if (node.type === "CLIPTextEncode" && node.title.startsWith("Positive")) w.value = prompt;
        if (node.type === "CLIPTextEncode" && node.title.startsWith("Negative")) w.value = "";
        if (node.type === "ModelSamplingSD3") w.value = 3;
        const key = `${node.type}.${w.name}`;
        if (key in more) w.value = more[key];
      });
    }
    const end = new Promise((resolve) => {
      for (const e of ["execution_success", "execution_error"]) api.addEventListener(e, (d) => resolve(d.detail));
    });
    await window.ir.queuePrompt(0, 1);
    const result = await end;
    if (result?.exception_message) throw new Error(result.exception_message);
  }, [TOY, SIZE, PROMPT, widgets]);
  await page.waitForTimeout(1200);
}

async function shot(selector, file, index = 0) {
  // At 100 %, as the panel is read.
  await page.evaluate(([css, i]) => {
    const node = window.ir.graph.nodes.filter((n) => n.widgets?.some((w) => w.element?.matches?.(css)))[i];
    // Away from the other nodes, whose videos would be in front.
    node.pos = [6000, 0];
    window.ir.canvas.ds.scale = 1;
    window.ir.canvas.ds.offset = [60 - node.pos[0], 60 - node.pos[1]];
    window.ir.canvas.setDirty(true, true);
  }, [selector, index]);
  await page.waitForTimeout(800);
  await page.locator(`${selector}:visible`).nth(index).screenshot({ path: `${output}/${file}.png` });
}

// Every template as it opens.
const names = await page.evaluate(async () => {
  const found = await (await window.comfyAPI.api.api.fetchApi("/workflow_templates")).json();
  return Object.entries(found).find(([key]) => key.includes("IntrinsicReward"))[1];
});
await page.evaluate(() => window.ir.extensionManager.setting.set("Comfy.Minimap.Visible", false));
for (const name of names) {
  await open(name);
  await page.evaluate(() => window.ir.extensionManager.command.execute("Comfy.Canvas.FitView"));
  await page.waitForTimeout(1200);
  for (const close of await page.locator(".p-toast-close-button, [role=alert] button[aria-label=Close]").all()) await close.click().catch(() => {});
  await page.screenshot({ path: `${output}/template ${name.slice(0, 2)}.png`, clip: { x: 62, y: 110, width: 1600, height: 800 } });
}

await run("01 Check a video for consistency", { "IntrinsicReward_ExampleClip.clip": "warped room" });
await shot(".ir-timeline", "timeline");
const RACE = "IntrinsicReward_PrismKSampler";
await run("12 Best of N with a PRISM head", {
  [`${RACE}.steps`]: 20, [`${RACE}.sampler_name`]: "euler", [`${RACE}.checkpoints`]: "15 %, 40 %, 65 %",
  "IntrinsicReward_LoadPrism.file": process.env.TOY_HEAD,
});
await page.evaluate((type) => {
  const node = window.ir.graph.nodes.find((n) => n.type === type);
  node.setSize([560, node.size[1] + 130]);
}, RACE);
await shot(".ir-race", "race_board");
await run("05 Guide sampling with Shell-LCC", {
  "KSampler.steps": 8, "KSampler.sampler_name": "euler", "KSampler.cfg": 5,
  "IntrinsicReward_LoadShellLCC.file": "toy_manifold.safetensors",
});
await page.evaluate(() => {
  const node = window.ir.graph.nodes.find((n) => n.type === "IntrinsicReward_ShellLCCGuidance");
  node.setSize([400, node.size[1] + 40]);
});
await shot(".ir-shell", "shell_strip");
await shot(".ir-timeline:not(.ir-shell *)", "shell_score");
for (const seed of [11, 22, 33]) {
  await run("12 Best of N with a PRISM head", {
    [`${RACE}.steps`]: 12, [`${RACE}.sampler_name`]: "euler", [`${RACE}.checkpoints`]: "40 %", [`${RACE}.seed`]: seed,
    [`${RACE}.candidates`]: 4, "IntrinsicReward_LoadPrism.file": process.env.TOY_HEAD,
  });
}
await page.evaluate(() => window.ir.extensionManager.command.execute("Workspace.ToggleSidebarTab.intrinsic-reward-gallery"));
await page.waitForTimeout(2500);
await page.locator(".ir-gallery").screenshot({ path: `${output}/gallery.png` });
await browser.close();
