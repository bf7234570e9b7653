// "How do I get one?" on loaders, and the upload of clips from the browser.

import { api } from "../../../scripts/api.js";
import { ask, el } from "./dom.js";
import { text } from "./texts.js";
import { openTemplate, toast } from "./workflow.js";

const FIT = "04 Fit a Shell-LCC manifold on your clips", HEAD = "11 Train a PRISM head";
const WITHOUT_HEAD = "02 Best of 8 without a trained head", GEOMETRY = "15 Consistency with Depth Anything 3";
const VIDEO = /\.(mp4|mov|mkv|webm|avi|m4v|mpg|mpeg|ts|gif|y4m)$/i;

const template = (name) => ({ label: text("open_template", name), action: () => openTemplate(name) });
const close = () => ({ label: text("close") });

export const HELP = {
  IntrinsicReward_LoadShellLCC: () => ["get_manifold", [template(FIT), close()]],
  IntrinsicReward_LoadPrism: () => ["get_head", [template(HEAD), template(WITHOUT_HEAD), close()]],
  IntrinsicReward_LoadGeometry: () => ["get_geometry", [template(GEOMETRY), close()]],
};
export const UPLOADS = new Set(["IntrinsicReward_EncodeClips"]);

export function attach(node) {
  const help = HELP[node.comfyClass];
  if (help) {
    addButton(node, "how", () => {
      const [key, choices] = help();
      ask(text("how"), text(key), choices);
    });
  }
  if (UPLOADS.has(node.comfyClass)) {
    addButton(node, "upload_clips", () => chooseFiles(node, false));
    addButton(node, "upload_folder", () => chooseFiles(node, true));
  }
}

// Buttons are not saved, and are behind all widgets that are.
function addButton(node, key, action) {
  const widget = node.addWidget("button", text(key), null, action, { serialize: false });
  widget.serialize = false;
}

function chooseFiles(node, folder) {
  const input = el("input", { type: "file", multiple: true, accept: "video/*,image/gif", webkitdirectory: folder });
  input.onchange = () => uploadClips(node, [...input.files], folder ? input.files[0]?.webkitRelativePath.split("/")[0] : null);
  input.click();
}

// Uploads videos into a folder of ComfyUI's input directory and chooses it in the node.
export async function uploadClips(node, files, folderName) {
  const videos = files.filter((file) => VIDEO.test(file.name));
  if (!videos.length) return toast(text("no_videos"), "warn");
  const name = (folderName || `clips_${new Date().toISOString().slice(0, 19).replace(/\D/g, "")}`).replace(/[^\w.-]+/g, "_");
  const failed = [];
  for (const [i, file] of videos.entries()) {
    node.title = text("uploading", i + 1, videos.length);
    node.setDirtyCanvas?.(true, true);
    const body = new FormData();
    body.append("image", file, file.name);
    body.append("subfolder", name);
    body.append("type", "input");
    const response = await api.fetchApi("/upload/image", { method: "POST", body }).catch(() => null);
    if (!response?.ok) failed.push(`${file.name} (${response?.statusText ?? "?"})`);
  }
  node.title = node.constructor.title;
  if (failed.length) toast(text("not_uploaded", failed.join(", ")), "error");
  if (failed.length === videos.length) return;
  const widget = node.widgets.find((w) => w.name === "folder");
  const options = widget.options.values;
  if (Array.isArray(options) && !options.includes(name)) options.push(name);
  widget.value = name;
  widget.callback?.(name);
  node.setDirtyCanvas?.(true, true);
  toast(text("uploaded", videos.length - failed.length, name));
}
