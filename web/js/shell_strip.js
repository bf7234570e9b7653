// Shell strip of Shell-LCC Guidance: share of tokens outside the band at each step. Events: see nodes/shell_strip.py.

import { api } from "../../../scripts/api.js";
import { el } from "./dom.js";
import { text } from "./texts.js";
import { Timeline } from "./timeline.js";
import { addPanel, findNode, store, stored } from "./workflow.js";

export const GUIDES = new Set(["IntrinsicReward_ShellLCCGuidance"]);
const KEY = "shell";
const strips = new WeakMap();

export class ShellStrip {
  constructor(node) {
    this.node = node;
    this.state = { steps: [], clips: null };
    this.title = el("span");
    this.bars = el("div", { className: "ir-strip" });
    this.comparison = new Timeline();
    Object.assign(this.comparison.element.style, { padding: "0", height: "auto", marginTop: "6px" });
    this.comparison.element.hidden = true;
    this.element = el("div", { className: "ir-panel ir-shell" },
      el("div", { className: "ir-head" }, this.title), this.bars,
      el("div", { className: "ir-dim" }, text("strip_help")), this.comparison.element);
  }

  step({ step, steps, sigma, before, after, clips }) {
    // A run begins again at its first step.
    const again = this.state.count !== steps || this.state.steps.some((s) => s?.step > step) || this.state.clips;
    if (again) this.state = { count: steps, steps: [], clips: null };
    this.state.steps[step] = { step, sigma, before, after };
    if (clips) this.state.clips = clips;
    this.draw();
  }

  draw() {
    const known = this.state.steps.filter(Boolean), last = known.at(-1);
    if (!last) return;
    const percent = (v) => `${(100 * v).toFixed(0)}\u00a0%`;
    this.title.textContent = text("strip_now", last.step + 1, this.state.count, percent(last.before), percent(last.after));
    this.bars.replaceChildren(...Array.from({ length: Math.max(this.state.count, last.step + 1) }, (_, i) => {
      const s = this.state.steps[i];
      return el("div", { title: s ? text("strip_step", i + 1, s.sigma, percent(s.before), percent(s.after)) : "" },
        ...(s ? [s.before, s.after].map((v) => el("i", { style: { height: `${100 * v}%` } })) : []));
    }));
    this.comparison.element.hidden = !this.state.clips;
    if (this.state.clips) this.comparison.show(this.state.clips);
    addPanel(this.node, this.element, 340, 170);
  }
}

export function stripOf(node) {
  if (!strips.has(node)) strips.set(node, new ShellStrip(node));
  return strips.get(node);
}

export function restore(node) {
  const state = stored(node, KEY);
  if (!state) return;
  stripOf(node).state = state;
  stripOf(node).draw();
}

export function listen() {
  api.addEventListener("intrinsic_reward.shell", ({ detail }) => {
    const node = findNode(detail.node);
    if (!node || !GUIDES.has(node.comfyClass)) return;
    stripOf(node).step(detail);
    store(node, KEY, stripOf(node).state);
  });
}
