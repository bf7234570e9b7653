// Checks of the pack in ComfyUI's real frontend, run by test_browser.py: node check.mjs PLAN.json
//
// The plan: {url, chromium, pack, shots (folder of screenshots), templates: {name: {widgets: {"Type.widget": value}}},
// stand_ins: {file name: file name}, panels: {template name: [css selector]}, nodes: [node ids], zh: {node id: title}, parts}.
// Prints one JSON line for each check: {check, error (null if it passed), seconds}.

import { createRequire } from "node:module";
import fs from "node:fs";
import path from "node:path";

const plan = JSON.parse(fs.readFileSync(process.argv[2], "utf-8"));
const { chromium } = createRequire(path.join(plan.playwright, "x.js"))("playwright-core");
// What the frontend itself reports of a server without a network, a user's files, or downloaded models.
const FOREIGN = /huggingface\.co|Content Security Policy|404 \(Not Found\)|legacy queue|ComfyApp graph accessed|MaskEditor|net::ERR/;
const LIMIT = 120000;

const browser = await chromium.launch({ executablePath: plan.chromium, args: ["--no-sandbox"] });
const page = await browser.newPage({ viewport: { width: 1680, height: 1000 } });
let errors = [];
page.on("console", (m) => { if (m.type() === "error" && !FOREIGN.test(m.text())) errors.push(m.text().slice(0, 500)); });
page.on("console", (m) => { if (/Intrinsic Reward:/.test(m.text())) errors.push(m.text().slice(0, 500)); });
page.on("pageerror", (e) => errors.push(e.message));

async function check(name, run) {
  if (plan.parts && !plan.parts.some((part) => name.startsWith(part))) return;
  const start = Date.now();
  let error = null;
  errors = [];
  try {
    await run();
    if (errors.length) error = `console: ${errors.join("; ")}`;
  } catch (e) {
    error = e.message.split("\n").slice(0, 6).join("\n");
  }
  if (error) await page.screenshot({ path: `${plan.shots}/failed ${name.replace(/\W+/g, " ")}.png` }).catch(() => {});
  console.log(JSON.stringify({ check: name, error, seconds: (Date.now() - start) / 1000 }));
}

function require(condition, message) {
  if (!condition) throw new Error(message);
}

async function open() {
  await page.goto(plan.url);
  // The pack's extension has been set up, as all have before ComfyUI opens the last workflow.
  await page.waitForFunction(() => window.comfyAPI?.app?.app?.extensionManager && window.comfyAPI.app.app.rootGraph
    && document.getElementById("intrinsic-reward-style"), null, { timeout: LIMIT });
  await page.evaluate(() => {
    window.ir = window.comfyAPI.app.app;
    window.finished = () => new Promise((resolve) => {
      for (const e of ["execution_success", "execution_error", "execution_interrupted"]) {
        window.ir.api.addEventListener(e, (d) => resolve([e, d.detail?.exception_message ?? ""]), { once: true });
      }
    });
  });
  await page.waitForTimeout(800);
}

const setting = (name, value) => page.evaluate(([n, v]) => window.ir.extensionManager.setting.set(n, v), [name, value]);
const command = (name) => page.evaluate((n) => window.ir.extensionManager.command.execute(n), name);
const nodeOf = (type) => `window.ir.graph.nodes.find((n) => n.type === "${type}")`;

// As a user does: the browser of templates, the pack's name, the card.
async function openTemplate(name) {
  await command("Comfy.BrowseTemplates");
  await page.locator("nav, aside, [role=dialog]").getByText(plan.pack.slice(0, 12)).first().click({ timeout: 20000 });
  const card = page.locator(`[data-testid="template-workflow-${name}"]`);
  await card.scrollIntoViewIfNeeded({ timeout: 20000 });
  await card.click();
  await page.waitForFunction((n) => window.ir.extensionManager.workflow?.activeWorkflow?.filename?.startsWith(n)
    || document.title.includes(n), name, { timeout: 20000 }).catch(() => {});
  await page.waitForFunction(() => !document.querySelector('[data-testid="template-workflows-content"]'), null, { timeout: 20000 });
  await page.waitForTimeout(600);
}

async function layout(name) {
  const found = await page.evaluate(() => {
    const nodes = window.ir.graph.nodes.map((n) => {
      const box = new Float32Array(4);
      n.getBounding(box);
      return { type: n.type, box: [...box], missing: !n.constructor?.nodeData && !/Note$/.test(n.type) };
    });
    const overlaps = nodes.flatMap((a, i) => nodes.slice(i + 1).filter((b) => (
      a.box[0] < b.box[0] + b.box[2] && b.box[0] < a.box[0] + a.box[2]
      && a.box[1] < b.box[1] + b.box[3] && b.box[1] < a.box[1] + a.box[3])).map((b) => `${a.type} and ${b.type}`));
    return { missing: nodes.filter((n) => n.missing).map((n) => n.type), overlaps, scale: window.ir.canvas.ds.scale };
  });
  require(!found.missing.length, `missing nodes: ${found.missing}`);
  require(!found.overlaps.length, `overlaps: ${found.overlaps}`);
  require(found.scale >= 0.595, `opens at zoom ${found.scale}: the canvas draws no text below 0.6`);
}

async function run(name) {
  await page.evaluate(([widgets, standIns]) => {
    for (const node of window.ir.graph.nodes) {
      for (const w of node.widgets ?? []) {
        const key = `${node.type}.${w.name}`;
        if (key in widgets) w.value = widgets[key]; else if (w.value in standIns) w.value = standIns[w.value];
      }
    }
    window.end = window.finished();
  }, [plan.templates[name].widgets, plan.stand_ins]);
  await command("Comfy.QueuePrompt");
  await ended();
}

async function ended() {
  const [event, message] = await page.evaluate((limit) => Promise.race([
    window.end, new Promise((resolve) => setTimeout(() => resolve(["timeout", ""]), limit))]), LIMIT);
  require(event === "execution_success", `${event}: ${message}`);
  await page.waitForTimeout(500);
}

const shot = (name) => page.screenshot({ path: `${plan.shots}/${name}.png` });

async function panelsShow(name) {
  for (const selector of plan.panels[name] ?? []) {
    const count = await page.locator(selector).count();
    require(count > 0, `no ${selector} after the run`);
  }
  const drawn = await page.evaluate(() => [...document.querySelectorAll(".ir-timeline canvas, .ir-card canvas")].map((c) => {
    const { data } = c.getContext("2d").getImageData(0, 0, c.width, c.height);
    return new Set(data).size > 3;
  }));
  require(drawn.every(Boolean), `${drawn.filter((d) => !d).length} of ${drawn.length} pictures of the panels are empty`);
}

await open();
await setting("Comfy.VueNodes.Enabled", false);
await setting("Comfy.Locale", "en");
await page.keyboard.press("Escape");

for (const name of Object.keys(plan.templates)) {
  await check(`template ${name}`, async () => {
    await openTemplate(name);
    await layout(name);
    // Live data: the board is there before the run has ended.
    const live = (plan.panels[name] ?? []).includes(".ir-card") && page.waitForSelector(".ir-card", { timeout: LIMIT });
    await run(name);
    await live;
    await panelsShow(name);
    await layout(name);
    await shot(name);
  });
}

const RACE = "02 Best of 8 without a trained head", SAMPLER = "IntrinsicReward_PrismKSampler";

await check("race board", async () => {
  await openTemplate(RACE);
  await run(RACE);
  const cards = page.locator(".ir-card");
  require(await cards.count() === 8, `${await cards.count()} cards, expected 8`);
  require(await page.locator(".ir-card.ir-won").count() === 1, "no winner");
  const seed = (i) => cards.nth(i).getAttribute("data-seed");
  const act = (i, k) => cards.nth(i).locator(".ir-actions button").nth(k).evaluate((b) => b.click());
  await act(2, 0);
  const widget = await page.evaluate(`${nodeOf(SAMPLER)}.widgets.find((w) => w.name === "seed").value`);
  require(String(widget) === await seed(2), `"use this seed" set ${widget}, expected ${await seed(2)}`);
  // Only the chosen seed runs; the widgets and the other cards stay.
  await page.evaluate(() => { window.end = window.finished(); });
  await act(3, 1);
  await ended();
  require(await cards.count() === 8, "finishing one seed removed the other cards");
  require(/finished/.test(await cards.nth(3).textContent()), "the finished seed is not marked");
  require(await page.evaluate(`${nodeOf(SAMPLER)}.widgets.find((w) => w.name === "candidates").value`) === 8, "candidates changed");
  const before = await pairs();
  await page.evaluate(() => { window.end = window.finished(); });
  await act(0, 2);
  await act(1, 3);
  await page.locator(".ir-race .ir-head button").first().evaluate((b) => b.click());
  await ended();
  require(await pairs() === before + 1, "no preference was recorded");
  const download = page.waitForEvent("download");
  await page.locator(".ir-race .ir-head button").last().evaluate((b) => b.click());
  const csv = fs.readFileSync(await (await download).path(), "utf-8").trim().split("\n");
  require(csv.length === 9 && csv[0].startsWith("rank,seed"), `CSV: ${csv[0]}, ${csv.length} lines`);
  await shot("race board");
});

async function pairs() {
  const answer = await page.evaluate(async () => (await window.ir.api.fetchApi("/intrinsic_reward/preferences")).json());
  return answer.find((f) => f.name === "my_preferences")?.chosen ?? 0;
}

await check("reload and saved workflow", async () => {
  await openTemplate(RACE);
  await run(RACE);
  const saved = await page.evaluate(() => JSON.stringify(window.ir.rootGraph.serialize()));
  require(saved.length < 200000, `the saved workflow has ${saved.length} characters`);
  await open();
  await page.evaluate(async (text) => window.ir.loadGraphData(JSON.parse(text), true, true, "saved"), saved);
  await page.waitForTimeout(1500);
  // Boards of workflows in other tabs are in the page as well, hidden.
  const shown = await page.locator(".ir-card:visible").count();
  require(shown === 8, `the board of a saved workflow has ${shown} cards, expected 8`);
});

await check("gallery", async () => {
  await page.evaluate(() => localStorage.removeItem("intrinsic_reward_votes"));
  // Two clips of one prompt.
  for (const seed of [11, 22]) {
    await openTemplate(RACE);
    plan.templates[RACE].widgets[`${SAMPLER}.seed`] = seed;
    await run(RACE);
  }
  await command("Workspace.ToggleSidebarTab.intrinsic-reward-gallery");
  await page.waitForSelector(".ir-gallery .ir-card", { timeout: 10000 });
  const cards = page.locator(".ir-gallery .ir-card");
  require(await cards.count() >= 2, `${await cards.count()} clips, expected 2 or more`);
  await page.waitForTimeout(1000);
  await shot("gallery");
  const before = await pairs();
  await cards.nth(0).locator(".ir-actions button").nth(1).click();
  await page.evaluate(() => { window.end = window.finished(); });
  await page.locator(".ir-gallery .ir-card").nth(1).locator(".ir-actions button").nth(2).click();
  await ended();
  require(await pairs() === before + 1, "the thumbs recorded no pair");
  await command("Workspace.ToggleSidebarTab.intrinsic-reward-gallery");
});

await check("how do I get one, and upload", async () => {
  await page.evaluate(() => window.ir.loadGraphData({ version: 0.4, nodes: [], links: [], groups: [] }, true, true, "empty"));
  for (const type of ["IntrinsicReward_LoadShellLCC", "IntrinsicReward_LoadPrism", "IntrinsicReward_LoadGeometry"]) {
    await page.evaluate((t) => {
      const node = window.LiteGraph.createNode(t);
      window.ir.graph.add(node);
      node.widgets.find((w) => w.type === "button").callback();
    }, type);
    const dialog = page.locator("dialog.ir-dialog");
    require(await dialog.count() === 1, `no help for ${type}`);
    await dialog.getByRole("button").last().click();
  }
  await page.evaluate(() => window.ir.graph.add(window.LiteGraph.createNode("IntrinsicReward_EncodeClips")));
  const chooser = page.waitForEvent("filechooser");
  await page.evaluate(`${nodeOf("IntrinsicReward_EncodeClips")}.widgets.find((w) => w.type === "button").callback()`);
  await (await chooser).setFiles(plan.videos);
  await page.waitForFunction(`/^clips_/.test(${nodeOf("IntrinsicReward_EncodeClips")}.widgets.find((w) => w.name === "folder").value)`,
    null, { timeout: 20000 });
  await page.waitForTimeout(300);
});

async function helpOf(type) {
  await page.evaluate((t) => {
    window.ir.graph.clear();
    const node = window.LiteGraph.createNode(t);
    window.ir.graph.add(node);
    window.ir.canvas.selectItems([node]);
  }, type);
  // The toolbox moves with the node while the canvas settles.
  await page.locator('[data-testid="info-button"]').first().evaluate((b) => b.click(), null, { timeout: 10000 });
  const title = page.locator(".node-help-content, [data-testid=node-help], .node-help-content h1").first();
  await title.waitFor({ timeout: 10000 });
  await page.waitForFunction((t) => [...document.querySelectorAll(".node-help-content")].some((e) => (
    e.textContent.length > 200 && e.querySelector("table") && e.dataset.seen !== t)), type, { timeout: 10000 });
  return page.locator(".node-help-content").first().textContent();
}

await check("help of every node", async () => {
  await page.evaluate(() => window.ir.loadGraphData({ version: 0.4, nodes: [], links: [], groups: [] }, true, true, "help"));
  for (const type of plan.nodes) {
    const text = await helpOf(type);
    require(text.includes(plan.titles[type]), `${type}: help of another node: ${text.slice(0, 80)}`);
    const clipped = await page.evaluate(() => [...document.querySelectorAll(".node-help-content table")].some((t) => (
      t.scrollWidth > t.closest(".node-help-content").clientWidth)));
    require(!clipped, `${type}: a table of its help is wider than the panel`);
  }
  await shot("help");
});

await check("Nodes 2.0", async () => {
  await setting("Comfy.VueNodes.Enabled", true);
  for (const name of ["01 Check a video for consistency", RACE]) {
    await openTemplate(name);
    await run(name);
    await panelsShow(name);
    const heights = await page.evaluate(() => window.ir.graph.nodes.filter((n) => (
      n.widgets?.some((w) => w.name === "intrinsic_reward_panel"))).map((n) => n.size[1]));
    require(heights.every((h) => h < 1000), `nodes grew to ${heights}`);
    const previews = await page.evaluate(() => [...document.querySelectorAll("[data-node-id]:has(.ir-panel) img")].filter((i) => (
      i.getClientRects().length)).length);
    require(previews === 0, `${previews} pictures besides the panel`);
    await shot(`${name}, Nodes 2.0`);
  }
  await setting("Comfy.VueNodes.Enabled", false);
});

for (const language of ["zh", "ja"]) {
  await check(`language ${language}`, async () => {
    await setting("Comfy.Locale", language);
    await open();
    await openTemplate("01 Check a video for consistency");
    await run("01 Check a video for consistency");
    const type = "IntrinsicReward_GeometryTracks";
    const title = await page.evaluate(`${nodeOf(type)}.constructor.title`);
    require(title === plan.translated[language][type], `title '${title}', expected '${plan.translated[language][type]}'`);
    await shot(`language ${language}`);
    const text = await helpOf(type);
    require(text.includes(plan.help[language]), `help is not translated: ${text.slice(0, 80)}`);
  });
}
await setting("Comfy.Locale", "en");
await browser.close();
