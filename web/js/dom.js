// Elements and styles shared by the panels.

// For Nodes 2.0: a panel replaces the live preview below it, and reports keep their line breaks.
const STYLE = `
.ir-panel { box-sizing: border-box; width: 100%; height: 100%; overflow: auto; padding: 6px; border-radius: 6px;
  background: var(--comfy-input-bg, #222); color: var(--input-text, #ddd); font: 12px/1.35 system-ui, sans-serif; }
.ir-panel * { box-sizing: border-box; }
.ir-head { display: flex; gap: 6px; align-items: center; flex-wrap: wrap; margin-bottom: 6px; }
.ir-head > span { flex: 1 1 140px; }
.ir-dim { color: var(--descrip-text, #999); }
.ir-button { cursor: pointer; border: 1px solid var(--border-color, #4e4e4e); border-radius: 4px; padding: 2px 7px;
  background: var(--comfy-menu-bg, #353535); color: inherit; font: inherit; }
.ir-button:hover, .ir-button:focus-visible { border-color: #8ab4f8; }
.ir-button[disabled] { opacity: .45; cursor: default; }
.ir-button.ir-on { background: #2f5d3a; }
.ir-button.ir-off { background: #6b3328; }
.ir-cards { display: grid; gap: 6px; grid-template-columns: repeat(auto-fill, minmax(124px, 1fr)); }
.ir-card { position: relative; border: 2px solid transparent; border-radius: 5px; overflow: hidden;
  background: var(--comfy-menu-bg, #353535); }
.ir-card canvas, .ir-card video, .ir-card img { display: block; width: 100%; aspect-ratio: 16 / 9; object-fit: contain;
  background: #18181c; }
.ir-card.ir-won { border-color: #6edc82; }
.ir-card.ir-dropped canvas { opacity: .4; }
.ir-rank { position: absolute; top: 4px; left: 4px; padding: 0 5px; border-radius: 8px; background: #000a; color: #fff;
  font-weight: 600; }
.ir-body { padding: 3px 5px 4px; }
.ir-line { display: flex; justify-content: space-between; gap: 4px; white-space: nowrap; overflow: hidden; }
.ir-line > span { overflow: hidden; text-overflow: ellipsis; }
.ir-bars { display: flex; gap: 2px; align-items: flex-end; height: 18px; margin: 2px 0; }
.ir-bars i { flex: 1; min-height: 2px; background: #6c8ebf; border-radius: 1px; }
.ir-card.ir-won .ir-bars i { background: #6edc82; }
.ir-card .ir-dim { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.ir-card .ir-prompt { white-space: normal; }
.ir-actions { display: flex; gap: 3px; }
.ir-actions .ir-button { flex: 1; padding: 1px 0; text-align: center; }
.ir-frame { position: relative; width: 100%; touch-action: none; }
.ir-frame canvas { display: block; width: 100%; margin: 0 auto; border-radius: 4px; background: #18181c; cursor: ew-resize; }
.ir-curve { display: block; width: 100%; height: 62px; margin-top: 4px; cursor: pointer; background: #18181c;
  border-radius: 4px; }
.ir-first { margin-bottom: 4px; }
.ir-report { white-space: pre-wrap; margin: 2px 0 4px; font: inherit; user-select: text; }
.ir-panel summary { cursor: pointer; }
.ir-legend { display: flex; align-items: center; gap: 5px; margin-top: 4px; }
.ir-legend i { flex: 1; height: 8px; border-radius: 2px; }
.ir-strip { display: flex; gap: 2px; align-items: flex-end; height: 56px; padding: 2px; background: #18181c;
  border-radius: 4px; }
.ir-strip div { flex: 1; position: relative; height: 100%; }
.ir-strip i { position: absolute; bottom: 0; width: 100%; background: #6b7076; }
.ir-strip i + i { background: #6edc82; width: 55%; left: 22%; }
.ir-dialog { max-width: 520px; border: 1px solid var(--border-color, #4e4e4e); border-radius: 8px; padding: 16px;
  background: var(--comfy-menu-bg, #353535); color: var(--input-text, #ddd); font: 14px/1.45 system-ui, sans-serif; }
.ir-dialog::backdrop { background: #0008; }
.ir-dialog h3 { margin: 0 0 8px; font-size: 16px; }
.ir-dialog p { margin: 0 0 10px; white-space: pre-line; overflow-wrap: anywhere; }
.ir-dialog .ir-buttons { display: flex; flex-wrap: wrap; gap: 8px; }
.ir-dialog .ir-button { padding: 5px 12px; }
.ir-gallery { padding: 8px; height: 100%; overflow: auto; }
.ir-gallery .ir-cards { grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); }
.ir-gallery .ir-line:has(b) { white-space: normal; }
.ir-gallery input, .ir-gallery select { background: var(--comfy-input-bg, #222); color: inherit; font: inherit;
  border: 1px solid var(--border-color, #4e4e4e); border-radius: 4px; padding: 2px 4px; min-width: 0; }
[data-node-id]:has(.ir-panel) img[src^="blob:"], [data-node-id]:has(.ir-panel) img[src^="blob:"] + div { display: none; }
.comfy-markdown-content[aria-label="$$node-text-preview"] p { white-space: pre-line; }
.ir-prompt { display: -webkit-box; -webkit-line-clamp: 2; -webkit-box-orient: vertical; overflow: hidden; }
`;

// Long names of files would make the tables of this pack's help pages wider than ComfyUI's panel.
const helpStyle = (pack) => `
.node-help-content:has(img[src*="/extensions/${pack}/"]) :is(td, th, code) { overflow-wrap: anywhere; white-space: normal; }
.node-help-content:has(img[src*="/extensions/${pack}/"]) table { width: 100%; }
.node-help-content:has(img[src*="/extensions/${pack}/"]) td:first-child { width: 1%; }
.node-help-content:has(img[src*="/extensions/${pack}/"]) :is(td:first-child, td:first-child code) { white-space: nowrap; }
.node-help-content:has(img[src*="/extensions/${pack}/"]) code { padding: 1px 3px; margin: 0; font-size: 12px; }
.node-help-content:has(img[src*="/extensions/${pack}/"]) :is(td, th) { padding: 6px; min-width: 0; }
`;

export function addStyle(pack) {
  if (document.getElementById("intrinsic-reward-style")) return;
  document.head.append(el("style", { id: "intrinsic-reward-style", textContent: STYLE + helpStyle(pack) }));
}

// An element with properties (`style` and `dataset` as objects, `on...` as listeners) and children (elements or texts).
export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value == null) continue;
    if (name === "style" || name === "dataset") Object.assign(element[name], value);
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element[name] = value;
  }
  element.append(...children.flat().filter((child) => child != null && child !== false));
  return element;
}

export function button(label, title, onclick, properties = {}) {
  return el("button", { className: "ir-button", type: "button", title, onclick, ...properties }, label);
}

export function icon(name) {
  return el("i", { className: `pi pi-${name}`, style: { position: "static", background: "none" } });
}

// A modal dialog: title, text, and choices [{label, action, href}], each of which closes it.
export function ask(title, text, choices) {
  const dialog = el("dialog", { className: "ir-dialog" });
  const close = () => { dialog.close(); dialog.remove(); };
  const buttons = choices.map((choice) => button(choice.label, "", () => { close(); choice.action?.(); }));
  dialog.append(el("h3", {}, title), el("p", {}, text), el("div", { className: "ir-buttons" }, buttons));
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}

// A report: its first line, which says the result, and the rest behind a triangle.
export class Report {
  constructor() {
    this.first = el("div", { className: "ir-first" });
    this.rest = el("pre", { className: "ir-report" });
    this.more = el("details", { hidden: true }, el("summary", { className: "ir-dim" }), this.rest);
    this.element = el("div", { hidden: true }, this.first, this.more);
  }

  show(text, label, withFirst = true) {
    const [first, ...rest] = (text ?? "").split("\n");
    this.element.hidden = !text;
    this.first.textContent = withFirst ? first : "";
    this.more.firstChild.textContent = label;
    this.rest.textContent = (withFirst ? rest : [first, ...rest]).join("\n");
    this.more.hidden = !this.rest.textContent;
  }
}

export function download(name, text, type = "text/csv") {
  const url = URL.createObjectURL(new Blob([text], { type }));
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}
