// Race board of PRISM Best-of-N: a card for every candidate, live. State: see nodes/live_race.py.

import { api } from "../../../scripts/api.js";
import { Report, button, download, el, icon } from "./dom.js";
import { Clip, animate } from "./sprites.js";
import { text } from "./texts.js";
import {
  addPanel, ancestors, findNode, hideOthers, isExact, promptWith, queue, recordPrompt, seedWidget, store, stored,
  textBehind, toast, useSeed, valueNamed,
} from "./workflow.js";

export const RACERS = new Set(["IntrinsicReward_PrismKSampler", "IntrinsicReward_PrismBestOfN"]);
const RESULT = "intrinsic_reward_race", KEY = "race";
const boards = new WeakMap();

export class RaceBoard {
  constructor(node) {
    this.node = node;
    this.cards = [];
    this.marks = { winner: null, loser: null };
    this.title = el("span");
    this.record = button(text("record_pair"), text("record_pair_help"), () => this.recordPair(), { hidden: true });
    this.csv = button("CSV", text("csv_help"), () => download("race.csv", this.asCsv()));
    this.grid = el("div", { className: "ir-cards" });
    this.report = new Report();
    this.element = el("div", { className: "ir-panel ir-race" },
      el("div", { className: "ir-head" }, this.title, this.record, this.csv), this.grid,
      this.report.element);
  }

  show(state) {
    if (!state?.candidates?.length) return;
    state = this.merged(state);
    this.state = state;
    const same = this.cards.length === state.candidates.length
      && this.cards.every((card, i) => card.seed === state.candidates[i].seed);
    if (!same) {
      this.marks = { winner: null, loser: null };
      this.record.hidden = true;
      this.cards = state.candidates.map((c) => this.newCard(c.seed));
      this.grid.replaceChildren(...this.cards.map((card) => card.element));
    }
    this.update();
    addPanel(this.node, this.element, 420, 320);
    hideOthers(this.node);
  }

  // "Finish this one" runs the node with one seed of the board: its clip then belongs to the board's card.
  merged(state) {
    const [only] = state.candidates, board = this.state?.candidates;
    if (state.candidates.length > 1 || !board || board.length < 2) return state;
    const at = board.findIndex((c) => c.seed === only.seed);
    if (at < 0) return state;
    const candidates = board.map((c, i) => (i === at
      ? { ...c, sheet: only.sheet ?? c.sheet, poster: only.poster ?? c.poster, finished: true } : c));
    return { ...this.state, candidates };
  }

  newCard(seed) {
    const card = { seed, clip: null, version: null };
    card.canvas = el("canvas", { width: 208, height: 120 });
    card.rank = el("span", { className: "ir-rank" });
    card.score = el("span");
    card.bars = el("div", { className: "ir-bars" });
    card.status = el("div", { className: "ir-dim" });
    const usable = isExact(seed);
    const action = (name, help, run, needsSeed) => button(icon(name), text(help), run, { disabled: needsSeed && !usable });
    card.winner = action("thumbs-up", "mark_winner", () => this.mark("winner", seed), true);
    card.loser = action("thumbs-down", "mark_loser", () => this.mark("loser", seed), true);
    card.element = el("div", { className: "ir-card", dataset: { seed } }, card.canvas, card.rank,
      el("div", { className: "ir-body" },
        el("div", { className: "ir-line" }, el("span", { title: seed }, `${text("seed")} ${seed}`), card.score),
        card.bars, card.status,
        el("div", { className: "ir-actions" },
          action("copy", "use_seed", () => useSeed(this.node, seed), true),
          action("play", "finish", () => this.finish(seed), true), card.winner, card.loser)));
    animate(card.canvas, (tick) => card.clip?.draw(card.canvas, tick % card.clip.count));
    return card;
  }

  update() {
    const { candidates, checkpoints, done, meaning } = this.state;
    const best = candidates.findIndex((c) => c.rank === 1);
    this.title.replaceChildren(done && best >= 0
      ? text("race_best", candidates.length, candidates[best].seed, meaning) : text("race_running", candidates.length));
    const ranges = {};
    for (const [step, score] of candidates.flatMap((c) => c.scores)) {
      ranges[step] ??= [score, score];
      ranges[step] = [Math.min(ranges[step][0], score), Math.max(ranges[step][1], score)];
    }
    const sigma = Object.fromEntries(checkpoints.map(([step, value]) => [step, value]));
    candidates.forEach((c, i) => {
      const card = this.cards[i], won = done && c.dropped == null;
      card.element.classList.toggle("ir-won", won);
      card.element.classList.toggle("ir-dropped", c.dropped != null && !c.finished);
      card.element.style.order = done ? c.rank ?? candidates.length : 0;
      card.rank.textContent = c.rank ? `#${c.rank}` : "";
      card.rank.hidden = !c.rank;
      const last = c.scores.at(-1);
      card.score.textContent = last ? last[1].toPrecision(3) : "";
      card.bars.replaceChildren(...c.scores.map(([step, score]) => {
        const [low, high] = ranges[step];
        const share = high > low ? (score - low) / (high - low) : 1;
        const at = step in sigma ? text("at_step", step, sigma[step].toFixed(3)) : text("at_end");
        return el("i", { title: `${at}: ${score.toPrecision(5)}`, style: { height: `${12 + 88 * share}%` } });
      }));
      card.bars.hidden = !c.scores.length;
      card.status.textContent = this.status(c, won);
      this.picture(card, c.sheet, c.poster);
    });
  }

  status(c, won) {
    if (c.finished) return text("finished");
    if (won) return text("kept");
    if (c.dropped != null) return c.dropped ? text("dropped_at", c.dropped) : text("dropped");
    const { steps } = this.state;
    return c.step ? text("step_of", c.step, steps ?? "?") : text("waiting");
  }

  picture(card, sheet, poster) {
    const version = sheet?.version ?? poster?.length ?? null;
    if (version == null || version === card.version) return;
    card.version = version;
    // The picture before is drawn until the new one has arrived.
    const clip = new Clip(sheet, poster, () => {
      if (!clip.image) return;
      card.canvas.height = Math.round(card.canvas.width * clip.aspect);
      card.clip = clip;
      clip.draw(card.canvas, 0);
    });
  }

  step({ candidate, step, sheet }) {
    const c = this.state?.candidates[candidate], card = this.cards[candidate];
    if (!c || !card) return;
    c.step = step;
    if (sheet) c.sheet = sheet;
    card.status.textContent = this.status(c, false);
    this.picture(card, sheet, null);
  }

  mark(role, seed) {
    const other = role === "winner" ? "loser" : "winner";
    this.marks[role] = this.marks[role] === seed ? null : seed;
    if (this.marks[other] === seed) this.marks[other] = null;
    for (const card of this.cards) {
      card.winner.classList.toggle("ir-on", card.seed === this.marks.winner);
      card.loser.classList.toggle("ir-off", card.seed === this.marks.loser);
    }
    this.record.hidden = !(this.marks.winner && this.marks.loser);
  }

  // [widget, value] pairs that make the node the ordinary run of one seed; null where that is not possible.
  forOne(seed) {
    const found = seedWidget(this.node);
    if (!found) { toast(text("no_seed_widget"), "warn"); return null; }
    const byName = (name) => this.node.widgets.find((w) => w.name === name);
    return [[found.widget, Number(seed)], [byName("candidates"), 1], [byName("keep"), 1]].filter(([widget]) => widget);
  }

  async finish(seed) {
    const changes = this.forOne(seed);
    if (changes && await queue(await promptWith(changes))) toast(text("finish_queued", seed));
  }

  // Samples both marked seeds to the end, since only a finished clip is a fair example, and records them.
  async recordPair() {
    const { winner, loser } = this.marks, nodes = {};
    let prompt = null, id = null;
    for (const [name, seed] of [["winner", winner], ["loser", loser]]) {
      const changes = this.forOne(seed);
      if (!changes) return;
      prompt = await promptWith(changes);
      id = Object.keys(prompt.output).find((key) => findNode(key) === this.node);
      if (!id) return;
      // Nodes that differ between the two runs get names of their own; all others are shared.
      const own = new Set([id]);
      const noise = prompt.output[id].inputs.noise;
      if (Array.isArray(noise)) own.add(String(noise[0]));
      const renamed = (key) => (own.has(String(key)) ? `ir_${name}_${key}` : String(key));
      for (const [key, node] of Object.entries(ancestors(prompt.output, [id]))) {
        const inputs = Object.fromEntries(Object.entries(node.inputs).map(([k, v]) => (
          [k, Array.isArray(v) ? [renamed(v[0]), v[1]] : v])));
        nodes[renamed(key)] = { ...node, inputs };
      }
    }
    const details = {
      prompt: textBehind(prompt.output, id, "positive"), negative: textBehind(prompt.output, id, "negative"),
      model: valueNamed(prompt.output, "unet_name", "ckpt_name"), seed_list: `${winner}, ${loser}`,
    };
    if (!details.prompt) return toast(text("no_prompt_text"), "warn");
    const output = recordPrompt(nodes, [`ir_winner_${id}`, 0], [`ir_loser_${id}`, 0], details);
    if (await queue({ ...prompt, output })) {
      toast(text("pair_queued", winner, loser, "my_preferences"));
      this.mark("winner", winner);
      this.mark("loser", loser);
    }
  }

  asCsv() {
    const steps = [...new Set(this.state.candidates.flatMap((c) => c.scores.map(([step]) => step)))];
    const rows = this.state.candidates.map((c) => {
      const scores = Object.fromEntries(c.scores);
      return [c.rank ?? "", c.seed, ...steps.map((s) => scores[s] ?? ""), c.dropped ?? ""].join(",");
    });
    const head = ["rank", "seed", ...steps.map((s) => (s ? `score_at_step_${s}` : "score_of_draft")), "dropped_at_step"];
    return [head.join(","), ...rows].join("\n") + "\n";
  }
}

export function boardOf(node) {
  if (!boards.has(node)) boards.set(node, new RaceBoard(node));
  return boards.get(node);
}

function keep(node, state) {
  store(node, KEY, state);
  boardOf(node).show(state);
}

export function attach(node) {
  const executed = node.onExecuted;
  node.onExecuted = function (output) {
    executed?.apply(this, arguments);
    const state = output?.[RESULT]?.[0];
    if (!state) return;
    boardOf(this).show(state);
    boardOf(this).report.show(output.text?.[0], text("report"), false);
    store(this, KEY, boardOf(this).state);
  };
}

export function restore(node) {
  const state = stored(node, KEY);
  if (state) boardOf(node).show(state);
}

export function listen() {
  api.addEventListener("intrinsic_reward.race", ({ detail }) => {
    const node = findNode(detail.node);
    if (node && RACERS.has(node.comfyClass)) keep(node, boardOf(node).merged(detail.state));
  });
  api.addEventListener("intrinsic_reward.race_step", ({ detail }) => {
    const node = findNode(detail.node);
    if (node && RACERS.has(node.comfyClass)) boardOf(node).step(detail);
  });
}
