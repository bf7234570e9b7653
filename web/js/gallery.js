// Rewards gallery: saved clips with scores and seeds; thumbs make pairs for Record Preference. Data: nodes/gallery.py.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { button, el, icon } from "./dom.js";
import { text } from "./texts.js";
import { openTemplate, queue, recordPrompt, toast } from "./workflow.js";

const VOTES = "intrinsic_reward_votes", TRAINING = "09 Train a preference LoRA";
// Chosen pairs from which a training can be tried, and those that the pack's benchmark used.
const ENOUGH = [[400, "pairs_benchmark"], [100, "pairs_first"], [16, "pairs_try"], [0, "pairs_few"]];

export class Gallery {
  constructor() {
    this.sort = el("select", { onchange: () => this.draw() });
    this.folder = el("input", { value: "my_preferences", size: 14, title: text("folder_help"), onchange: () => this.count() });
    this.counts = el("div", { className: "ir-dim" });
    this.empty = el("p", { className: "ir-dim" }, text("gallery_empty"));
    this.grid = el("div", { className: "ir-cards" });
    this.element = el("div", { className: "ir-panel ir-gallery" },
      el("div", { className: "ir-head" }, this.sort, this.folder,
        button(icon("refresh"), text("refresh"), () => this.load())),
      this.counts,
      el("div", { className: "ir-head" }, button(text("open_template", TRAINING), "", () => openTemplate(TRAINING))),
      this.empty, this.grid);
    this.clips = [];
  }

  async load() {
    const response = await api.fetchApi("/intrinsic_reward/clips").catch(() => null);
    this.clips = response?.ok ? await response.json() : [];
    const names = [...new Set(this.clips.flatMap((c) => c.scores.map((s) => s.name)))];
    const chosen = this.sort.value;
    this.sort.replaceChildren(el("option", { value: "" }, text("newest")), ...names.map((n) => el("option", { value: n }, n)));
    this.sort.value = names.includes(chosen) ? chosen : "";
    this.draw();
    await this.count();
  }

  async count() {
    const response = await api.fetchApi("/intrinsic_reward/preferences").catch(() => null);
    const folders = response?.ok ? await response.json() : [];
    const mine = folders.find((f) => f.name === this.folder.value) ?? { chosen: 0, records: 0, prompts: 0 };
    const [, key] = ENOUGH.find(([least]) => mine.chosen >= least);
    this.counts.textContent = `${text("pair_count", mine.chosen, mine.prompts)} ${text(key)}`;
  }

  draw() {
    const name = this.sort.value;
    const value = (clip) => clip.scores.find((s) => s.name === name)?.value ?? -Infinity;
    const clips = [...this.clips].sort((a, b) => (name ? value(b) - value(a) : b.changed - a.changed));
    this.empty.hidden = clips.length > 0;
    const votes = read();
    this.grid.replaceChildren(...clips.map((clip) => this.card(clip, votes)));
  }

  card(clip, votes) {
    const query = new URLSearchParams({ filename: clip.filename, subfolder: clip.subfolder, type: clip.type, v: clip.changed });
    const src = api.apiURL(`/view?${query}`), video = !clip.filename.endsWith(".webp");
    const picture = video
      ? el("video", { src, muted: true, loop: true, preload: "metadata", playsInline: true,
        onmouseenter: (e) => e.target.play().catch(() => {}), onmouseleave: (e) => e.target.pause() })
      : el("img", { src, loading: "lazy" });
    const vote = votes[keyOf(clip)];
    const thumb = (role, name, style) => button(icon(name), text(`mark_${role}`), () => this.vote(clip, role), {
      disabled: !video, className: `ir-button ${vote === role ? style : ""}`,
    });
    return el("div", { className: "ir-card", dataset: { file: clip.filename } }, picture,
      el("div", { className: "ir-body" },
        clip.scores.map((s) => el("div", { className: "ir-line" }, el("span", { title: s.name }, s.name),
          el("b", {}, s.value.toPrecision(4)))),
        clip.seed && el("div", { className: "ir-line" }, el("span", {}, `${text("seed")} ${clip.seed}`)),
        el("div", { className: "ir-line ir-dim" }, el("span", { title: clip.filename }, clip.filename)),
        el("div", { className: "ir-prompt ir-dim", title: clip.prompt }, clip.prompt),
        el("div", { className: "ir-actions" }, button(icon("folder-open"), text("open_workflow"), () => openFrom(src, clip)),
          thumb("winner", "thumbs-up", "ir-on"), thumb("loser", "thumbs-down", "ir-off"))));
  }

  // A thumb up and a thumb down on clips of one prompt and size are a pair.
  async vote(clip, role) {
    const votes = read(), key = keyOf(clip);
    if (votes[key] === role) delete votes[key]; else votes[key] = role;
    const fits = (c) => keyOf(c) !== key && c.prompt && c.prompt === clip.prompt
      && String(c.size) === String(clip.size) && c.frames === clip.frames;
    const other = votes[key] && this.clips.find((c) => fits(c) && votes[keyOf(c)] === (role === "winner" ? "loser" : "winner"));
    if (other) {
      const [winner, loser] = role === "winner" ? [clip, other] : [other, clip];
      if (await this.record(winner, loser)) { delete votes[key]; delete votes[keyOf(other)]; }
    } else if (votes[key]) {
      toast(text(clip.prompt ? "needs_partner" : "no_prompt_text"), clip.prompt ? "info" : "warn");
    }
    localStorage.setItem(VOTES, JSON.stringify(votes));
    this.draw();
  }

  // Encodes both clips with the VAE that made them and records the pair.
  async record(winner, loser) {
    if (!winner.vae || winner.vae !== loser.vae) { toast(text("no_vae"), "warn"); return false; }
    const nodes = { ir_vae: { class_type: "VAELoader", inputs: { vae_name: winner.vae }, _meta: { title: "VAE" } } };
    for (const [name, clip] of [["winner", winner], ["loser", loser]]) {
      const file = `${clip.subfolder ? `${clip.subfolder}/` : ""}${clip.filename} [output]`;
      nodes[`ir_${name}`] = { class_type: "LoadVideo", inputs: { file }, _meta: { title: file } };
      nodes[`ir_${name}_frames`] = { class_type: "GetVideoComponents", inputs: { video: [`ir_${name}`, 0] },
        _meta: { title: "Frames" } };
      nodes[`ir_${name}_latent`] = { class_type: "VAEEncode", inputs: { pixels: [`ir_${name}_frames`, 0], vae: ["ir_vae", 0] },
        _meta: { title: "VAE Encode" } };
    }
    const seeds = winner.seed && loser.seed ? `${winner.seed}, ${loser.seed}` : "";
    const output = recordPrompt(nodes, ["ir_winner_latent", 0], ["ir_loser_latent", 0], {
      prompt: winner.prompt, negative: winner.negative, model: winner.model, name: this.folder.value, seed_list: seeds,
    });
    const { workflow } = await app.graphToPrompt();
    if (!await queue({ output, workflow })) return false;
    toast(text("pair_queued", winner.filename, loser.filename, this.folder.value));
    return true;
  }
}

const keyOf = (clip) => `${clip.subfolder}/${clip.filename}`;

function read() {
  try { return JSON.parse(localStorage.getItem(VOTES)) ?? {}; } catch { return {}; }
}

async function openFrom(src, clip) {
  const blob = await (await fetch(src)).blob();
  await app.handleFile(new File([blob], clip.filename, { type: blob.type }));
}

export function register() {
  if (!app.extensionManager?.registerSidebarTab) return;
  const gallery = new Gallery();
  app.extensionManager.registerSidebarTab({
    id: "intrinsic-reward-gallery", icon: "pi pi-star", title: text("gallery"), tooltip: text("gallery_tooltip"),
    type: "custom",
    render: (element) => { element.replaceChildren(gallery.element); gallery.load(); },
  });
  // A run has ended: there may be a new clip, or a new pair.
  api.addEventListener("execution_success", () => { if (gallery.element.isConnected) gallery.load(); });
}
