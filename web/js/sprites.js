// Clips as sprite sheets: see nodes/sprite_sheet.py.

import { api } from "../../../scripts/api.js";

const FRAME_MS = 125;
const playing = new Set();

export class Clip {
  // sheet: as the server sends it, or null; poster: a data URI that is drawn while or where the sheet is missing.
  constructor(sheet, poster, onload) {
    this.sheet = sheet;
    this.image = this.ready = null;
    if (poster) this._load(poster, false, onload);
    if (sheet) {
      const query = new URLSearchParams({
        filename: sheet.filename, subfolder: sheet.subfolder, type: sheet.type, v: sheet.version,
      });
      this._load(api.apiURL(`/view?${query}`), true, onload);
    }
  }

  _load(source, whole, onload) {
    const image = new Image();
    image.onload = () => {
      // The sheet replaces the poster, in whatever order they arrive.
      if (this.ready && !whole) return;
      this.image = image;
      this.ready = whole;
      onload?.();
    };
    // Files in the temp folder are gone after a restart of ComfyUI.
    image.onerror = () => onload?.();
    image.src = source;
  }

  get count() { return this.ready ? this.sheet.count : 1; }
  get aspect() {
    if (this.sheet) return this.sheet.height / this.sheet.width;
    return this.image ? this.image.naturalHeight / this.image.naturalWidth : 9 / 16;
  }

  // Index in the sheet of the frame that is nearest to frame `t` of the clip.
  nearest(t) {
    const indices = this.sheet?.indices ?? [0];
    let best = 0;
    for (let i = 1; i < indices.length; i++) if (Math.abs(indices[i] - t) < Math.abs(indices[best] - t)) best = i;
    return best;
  }

  // Draws frame i of the sheet over the whole canvas, from the share `from` of the width to the right edge.
  draw(canvas, i, from = 0) {
    if (!this.image) return;
    const context = canvas.getContext("2d");
    const s = this.sheet;
    const w = this.ready ? s.width : this.image.naturalWidth, h = this.ready ? s.height : this.image.naturalHeight;
    const x = this.ready ? (i % s.columns) * w : 0, y = this.ready ? Math.floor(i / s.columns) * h : 0;
    const left = Math.round(canvas.width * from), cut = (left / canvas.width) * w;
    if (left >= canvas.width) return;
    context.drawImage(this.image, x + cut, y, w - cut, h, left, 0, canvas.width - left, canvas.height);
  }
}

// Calls paint(number of the tick) some times a second while `canvas` is in the page. One timer serves all.
let timer = null, tick = 0;
export function animate(canvas, paint) {
  const entry = { canvas, paint, seen: false };
  playing.add(entry);
  timer ??= setInterval(() => {
    if (document.hidden) return;
    tick += 1;
    for (const p of playing) {
      if (p.canvas.isConnected) { p.seen = true; p.paint(tick); } else if (p.seen) playing.delete(p);
    }
  }, FRAME_MS);
  return () => playing.delete(entry);
}
