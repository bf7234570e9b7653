// What the panels do with the workflow: find nodes, keep state in them, open templates, queue prompts.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { text } from "./texts.js";

// This file is /extensions/<pack>/js/workflow.js: the folder's name is the pack's in all addresses.
export const PACK = decodeURIComponent(new URL(import.meta.url).pathname.split("/").at(-3));
const PROPERTY = "intrinsic_reward";

export function toast(detail, severity = "info") {
  const summary = "Intrinsic Reward";
  if (app.extensionManager?.toast) app.extensionManager.toast.add({ severity, summary, detail, life: 6000 });
  else console.log(`${summary}: ${detail}`);
}

// The node with an execution id, such as "5", or "12:5" for node 5 in the subgraph of node 12.
export function findNode(id) {
  let graph = app.rootGraph ?? app.graph, node = null;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById?.(Number(part)) ?? graph?.getNodeById?.(part);
    graph = node?.subgraph;
  }
  return node ?? null;
}

// State that is saved with the workflow.
export const stored = (node, key) => node.properties?.[PROPERTY]?.[key];
export function store(node, key, value) {
  node.properties ??= {};
  node.properties[PROPERTY] = { ...node.properties[PROPERTY], [key]: value };
}

// Adds the panel to a node the first time, and makes room for it.
export function addPanel(node, element, width, height) {
  // Nodes 2.0 would make the node as high as the panel's content.
  element.style.maxHeight = globalThis.LiteGraph?.vueNodesMode ? `${height}px` : "";
  const existing = node.widgets?.find((w) => w.name === "intrinsic_reward_panel");
  if (existing || !node.addDOMWidget) return;
  hideOthers(node);
  const widget = node.addDOMWidget("intrinsic_reward_panel", "intrinsic_reward_panel", element, {
    serialize: false, hideOnZoom: false, getMinHeight: () => height, getValue: () => undefined, setValue: () => {},
  });
  widget.serialize = false;
  grow(node, width);
}

// Makes a node large enough for its widgets; it never shrinks, as users choose sizes.
export function grow(node, width) {
  const needed = node.computeSize();
  node.setSize?.([Math.max(node.size[0], width), Math.max(node.size[1], needed[1])]);
  node.setDirtyCanvas?.(true, true);
}

// The panel shows what the pictures and the text of the node's result show.
export function hideOthers(node) {
  node.hideOutputImages = true;
  const clear = () => {
    node.imgs = undefined;
    for (const name of ["$$canvas-image-preview", "$$node-text-preview"]) {
      const at = node.widgets?.findIndex((w) => w.name === name) ?? -1;
      if (at >= 0) { node.widgets[at].onRemove?.(); node.widgets.splice(at, 1); }
    }
  };
  if (!node.intrinsicRewardBackground) {
    node.intrinsicRewardBackground = true;
    const before = node.onDrawBackground;
    node.onDrawBackground = function (...of) { before?.apply(this, of); clear(); };
  }
  clear();
}

export async function openTemplate(name) {
  const response = await api.fetchApi(`/workflow_templates/${encodeURIComponent(PACK)}/${encodeURIComponent(name)}.json`);
  if (!response.ok) return toast(text("no_template", name), "error");
  await app.loadGraphData(await response.json(), true, true, name);
}

// The widget that holds a sampler's seed: its own, or the one of the noise node that is connected.
export function seedWidget(node) {
  const own = node.widgets?.find((w) => w.name === "seed");
  if (own) return node.inputs?.find((i) => i.name === "seed")?.link != null ? null : { node, widget: own };
  const slot = node.inputs?.findIndex((i) => i.name === "noise") ?? -1;
  let source = slot < 0 ? null : node.getInputNode?.(slot);
  while (source?.type === "Reroute") source = source.getInputNode?.(0);
  const widget = source?.widgets?.find((w) => w.name === "noise_seed");
  return widget ? { node: source, widget } : null;
}

export const isExact = (seed) => Number.isSafeInteger(Number(seed)) && String(Number(seed)) === seed;

export function useSeed(node, seed) {
  const found = seedWidget(node);
  if (!found || !isExact(seed)) return toast(text(found ? "seed_too_large" : "no_seed_widget", seed), "warn");
  found.widget.value = Number(seed);
  const control = found.node.widgets.find((w) => w.name === "control_after_generate");
  if (control) control.value = "fixed";
  found.widget.callback?.(found.widget.value);
  (app.rootGraph ?? app.graph).setDirtyCanvas(true, true);
  toast(text("seed_set", seed));
}

// The prompt with other widget values, as [widget, value] pairs; the workflow on the canvas stays as it is.
export async function promptWith(changes) {
  const before = changes.map(([widget]) => widget.value);
  changes.forEach(([widget, value]) => { widget.value = value; });
  try {
    return await app.graphToPrompt();
  } finally {
    changes.forEach(([widget], i) => { widget.value = before[i]; });
  }
}

export async function queue(prompt) {
  try {
    await api.queuePrompt(0, prompt);
    return true;
  } catch (error) {
    const details = error.response?.error?.message ?? error.message ?? String(error);
    toast(text("not_queued", details), "error");
    return false;
  }
}

// The part of an API prompt that the nodes `ids` need.
export function ancestors(output, ids) {
  const kept = {}, open = [...ids];
  while (open.length) {
    const id = open.pop();
    if (kept[id] || !output[id]) continue;
    kept[id] = output[id];
    for (const value of Object.values(output[id].inputs)) if (Array.isArray(value)) open.push(String(value[0]));
  }
  return kept;
}

// The first text on the way from the input `name` of a node back to its text encoder, or "".
export function textBehind(output, id, name) {
  let link = output[id]?.inputs[name] ?? output[id]?.inputs.guider;
  for (let i = 0; Array.isArray(link) && i < 50; i++) {
    const { inputs } = output[link[0]] ?? { inputs: {} };
    if (typeof inputs.text === "string") return inputs.text;
    link = [name, "conditioning", "text"].map((key) => inputs[key]).find(Array.isArray);
  }
  return "";
}

export function valueNamed(output, ...names) {
  for (const node of Object.values(output)) {
    for (const name of names) if (typeof node.inputs[name] === "string") return node.inputs[name];
  }
  return "";
}

// A prompt for Record Preference: two latents, as [node, output], the better one first, with the nodes that make them.
export function recordPrompt(nodes, winner, loser, details) {
  return {
    ...nodes,
    ir_both: { class_type: "LatentBatch", inputs: { samples1: winner, samples2: loser }, _meta: { title: "Both clips" } },
    ir_record: {
      class_type: "IntrinsicReward_RecordPreference",
      inputs: {
        latent: ["ir_both", 0], prompt: "", negative: "", model: "", name: "my_preferences", latent_space: "auto",
        score_name: "score", winner: 0, loser: 1, ...details,
      },
      _meta: { title: "Record Preference" },
    },
  };
}
