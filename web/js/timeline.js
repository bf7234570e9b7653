// Timeline: figures over time, the frame under the cursor, and a divider between two synchronous clips.
// State: see nodes/timeline.py.

import { Report, button, el, icon } from "./dom.js";
import { Clip, animate } from "./sprites.js";
import { text } from "./texts.js";
import { addPanel, hideOthers, store, stored } from "./workflow.js";

export const TIMELINES = new Set([
  "IntrinsicReward_GeometryTracks", "IntrinsicReward_GeometryBestOfN", "IntrinsicReward_GeometryDA3",
  "IntrinsicReward_ShellLCCScore", "IntrinsicReward_ShellLCCRefine",
]);
const RESULT = "intrinsic_reward_timeline", KEY = "timeline";
const COLOURS = ["#8ab4f8", "#6edc82", "#f2b866"];
const CURVE = { width: 400, height: 62, top: 6, bottom: 10 };
// Of the picture, so that the curve below a square or upright clip can be seen.
const MOST_HEIGHT = 210;
const panels = new WeakMap();

export class Timeline {
  constructor() {
    this.frame = 0;
    this.divider = 0.5;
    this.playing = false;
    this.chooser = el("select", { onchange: () => this.choose(Number(this.chooser.value)) });
    this.name = el("span");
    this.play = button(icon("play"), text("play"), () => this.toggle());
    this.at = el("span", { className: "ir-dim", style: { flex: "none" } });
    this.canvas = el("canvas", { width: 320, height: 180, title: text("divider_help") });
    this.missing = el("div", { className: "ir-dim", hidden: true }, text("pictures_gone"));
    this.curve = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    this.curve.setAttribute("viewBox", `0 0 ${CURVE.width} ${CURVE.height}`);
    this.curve.setAttribute("preserveAspectRatio", "none");
    this.curve.classList.add("ir-curve");
    this.unit = el("div", { className: "ir-dim" });
    this.legend = el("div", { className: "ir-legend" });
    this.report = new Report();
    this.element = el("div", { className: "ir-panel ir-timeline" }, this.report.element,
      el("div", { className: "ir-head" }, this.chooser, this.name, this.at, this.play),
      el("div", { className: "ir-frame" }, this.canvas, this.missing), this.curve, this.unit, this.legend);
    drag(this.canvas, (share) => { this.divider = share; this.paint(); });
    drag(this.curve, (share) => { this.stop(); this.seek(share * (this.clip.frames - 1)); });
    animate(this.canvas, () => {
      if (!this.playing || !this.clip) return;
      this.seek(this.frame + this.stride >= this.clip.frames ? 0 : this.frame + this.stride);
    });
  }

  show(state) {
    if (!state?.clips?.length) return;
    this.state = state;
    this.report.show(state.report, text("report"));
    this.chooser.replaceChildren(...state.clips.map((clip, i) => el("option", { value: i }, clip.label)));
    this.chooser.hidden = state.clips.length < 2;
    this.legend.replaceChildren(...(state.legend ? [
      el("span", {}, state.legend.low),
      el("i", { style: { background: `linear-gradient(90deg, ${state.legend.colours.join(", ")})` } }),
      el("span", {}, state.legend.high)] : []));
    this.choose(0);
  }

  choose(number) {
    this.clip = this.state.clips[number];
    // A long clip is shown in a few frames only: play those.
    this.stride = Math.max(1, this.clip.frames / (this.clip.before?.count ?? this.clip.frames));
    this.name.textContent = this.state.clips.length > 1 ? "" : this.clip.label;
    this.chooser.value = number;
    const arrived = () => {
      this.missing.hidden = this.pictures.some((p) => p.ready);
      const { ready, aspect } = this.pictures[0];
      if (ready) {
        this.canvas.height = Math.round(this.canvas.width * aspect);
        this.canvas.style.width = `min(100%, ${Math.round(MOST_HEIGHT / aspect)}px)`;
      }
      this.paint();
    };
    this.pictures = [this.clip.before, this.clip.after].filter(Boolean).map((sheet) => new Clip(sheet, null, arrived));
    // Begin where the figures are worst, as there is something to see.
    const points = this.clip.series[0]?.points.filter(([, v]) => v != null) ?? [];
    const worst = points.reduce((a, b) => (b[1] > a[1] ? b : a), [0, -Infinity]);
    this.drawCurve();
    this.seek(worst[0]);
  }

  toggle() { this.playing = !this.playing; this.play.replaceChildren(icon(this.playing ? "pause" : "play")); }
  stop() { if (this.playing) this.toggle(); }

  seek(frame) {
    this.frame = Math.min(Math.max(0, frame), this.clip.frames - 1);
    const shown = Math.round(this.frame);
    const values = this.clip.series.map((s) => [s.label, nearest(s.points, shown)]).filter(([, v]) => v != null);
    this.at.textContent = [text("frame_of", shown + 1, this.clip.frames),
      ...values.map(([label, v]) => `${label} ${v.toPrecision(3)}`)].join(" · ");
    this.cursor?.setAttribute("x1", this.x(shown));
    this.cursor?.setAttribute("x2", this.x(shown));
    this.paint();
  }

  paint() {
    const [before, after] = this.pictures;
    if (!before?.image) return;
    const context = this.canvas.getContext("2d"), { width, height } = this.canvas;
    // Latents are small: their pixels are shown as they are.
    context.imageSmoothingEnabled = before.sheet.width > 200;
    context.clearRect(0, 0, width, height);
    before.draw(this.canvas, before.nearest(this.frame));
    if (!after?.image) return;
    const same = after.sheet.count === before.sheet.count;
    after.draw(this.canvas, same ? before.nearest(this.frame) : after.nearest(this.frame), this.divider);
    context.fillStyle = "#fff";
    context.fillRect(Math.round(width * this.divider) - 1, 0, 2, height);
    context.font = "12px system-ui, sans-serif";
    const [left, right] = this.state.names.map((name) => text(name));
    tag(context, left, 6, 16);
    tag(context, right, width - context.measureText(right).width - 6, 16);
  }

  x(frame) { return this.clip.frames > 1 ? 4 + (frame / (this.clip.frames - 1)) * (CURVE.width - 8) : CURVE.width / 2; }

  drawCurve() {
    const { series, cuts } = this.clip, { typical, unit } = this.state;
    const values = series.flatMap((s) => s.points.map(([, v]) => v)).filter((v) => v != null);
    this.curve.style.display = values.length ? "" : "none";
    const words = [unit, typical && text("typical", ...typical.map((v) => v.toPrecision(3)))].filter(Boolean).join(" · ");
    const names = series.length > 1 ? series.map((s, i) => el("b", { style: { color: COLOURS[i % COLOURS.length] } },
      ` ${text(s.label)}`)) : [];
    this.unit.replaceChildren(...(values.length ? [words, ...names] : []));
    const high = Math.max(...values, typical?.[1] ?? 0, 1e-9), low = Math.min(0, ...values);
    const y = (v) => CURVE.height - CURVE.bottom
      - ((v - low) / (high - low)) * (CURVE.height - CURVE.top - CURVE.bottom);
    const parts = [];
    if (typical) {
      parts.push(svg("rect", { x: 0, width: CURVE.width, y: y(typical[1]), height: Math.max(1, y(typical[0]) - y(typical[1])),
        fill: "#ffffff18" }));
    }
    for (const cut of cuts) parts.push(line(this.x(cut), "#f2b866", "3 3"));
    series.forEach((s, i) => {
      const runs = [[]];
      for (const [frame, v] of s.points) v == null ? runs.push([]) : runs.at(-1).push(`${this.x(frame)},${y(v)}`);
      for (const run of runs.filter((r) => r.length)) {
        parts.push(svg("polyline", { points: run.join(" "), fill: "none", stroke: COLOURS[i % COLOURS.length],
          "stroke-width": 1.5, "vector-effect": "non-scaling-stroke" }));
      }
      // Single values are no line.
      if (s.points.length < 40) {
        for (const [frame, v] of s.points.filter(([, value]) => value != null)) {
          parts.push(svg("circle", { cx: this.x(frame), cy: y(v), r: 1.8, fill: COLOURS[i % COLOURS.length] }));
        }
      }
    });
    this.cursor = line(0, "#fff");
    this.curve.replaceChildren(...parts, this.cursor);
  }
}

function svg(tag, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

function line(x, stroke, dashes = "none") {
  return svg("line", { x1: x, x2: x, y1: 0, y2: CURVE.height, stroke, "stroke-dasharray": dashes,
    "vector-effect": "non-scaling-stroke" });
}

function tag(context, words, x, y) {
  context.fillStyle = "#0009";
  context.fillRect(x - 3, y - 12, context.measureText(words).width + 6, 16);
  context.fillStyle = "#fff";
  context.fillText(words, x, y);
}

// Calls back with the share of the element's width at which the pointer is pressed or dragged.
function drag(element, back) {
  const at = (event) => {
    const box = element.getBoundingClientRect();
    back(Math.min(1, Math.max(0, (event.clientX - box.left) / box.width)));
  };
  element.addEventListener("pointerdown", (event) => {
    event.stopPropagation();
    element.setPointerCapture?.(event.pointerId);
    at(event);
  });
  element.addEventListener("pointermove", (event) => { if (event.buttons & 1) { event.stopPropagation(); at(event); } });
}

function nearest(points, frame) {
  let best = null;
  for (const [f, v] of points) if (v != null && (!best || Math.abs(f - frame) < Math.abs(best[0] - frame))) best = [f, v];
  return best?.[1] ?? null;
}

export function timelineOf(node) {
  if (!panels.has(node)) panels.set(node, new Timeline());
  return panels.get(node);
}

function show(node, state) {
  const panel = timelineOf(node);
  panel.show(state);
  if (!panel.state) return;
  addPanel(node, panel.element, 340, 380);
  hideOthers(node);
}

export function attach(node) {
  const executed = node.onExecuted;
  node.onExecuted = function (output) {
    executed?.apply(this, arguments);
    const state = output?.[RESULT]?.[0];
    if (!state) return;
    // The report is saved with the figures.
    const found = { ...state, report: output.text?.[0] };
    store(this, KEY, found);
    show(this, found);
  };
}

export function restore(node) {
  const state = stored(node, KEY);
  if (state) show(node, state);
}
