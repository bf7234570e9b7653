// Panels of the pack's nodes. Plain modules, no build step; each part does nothing on a frontend that lacks what it needs.

import { app } from "../../../scripts/app.js";
import { addStyle } from "./dom.js";
import * as gallery from "./gallery.js";
import * as getOne from "./get_one.js";
import * as race from "./race_board.js";
import * as shell from "./shell_strip.js";
import * as timeline from "./timeline.js";
import { PACK } from "./workflow.js";

// A panel that fails must not stop the workflow from opening.
function attempt(what, ...args) {
  try {
    return what(...args);
  } catch (error) {
    console.warn("Intrinsic Reward:", error);
  }
}

function panelOf(node) {
  if (race.RACERS.has(node.comfyClass)) return race;
  if (timeline.TIMELINES.has(node.comfyClass)) return timeline;
  return shell.GUIDES.has(node.comfyClass) ? shell : null;
}

app.registerExtension({
  name: "IntrinsicReward.Panels",
  setup() {
    attempt(addStyle, PACK);
    attempt(race.listen);
    attempt(shell.listen);
    attempt(gallery.register);
  },
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("IntrinsicReward_")) return;
    attempt(getOne.attach, node);
    const panel = panelOf(node);
    if (panel?.attach) attempt(panel.attach, node);
  },
  loadedGraphNode(node) {
    const panel = panelOf(node);
    if (panel) attempt(panel.restore, node);
  },
});
