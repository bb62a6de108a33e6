// Disables widgets that have no effect in the current graph; their tooltip says why.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { watch, whileInGraph } from "./changes.js";
import { connected, latentOf, widgetValue } from "./model.js";

const CUSTOM = "width x height"; // the choice of `size` for which width and height apply
const tooltips = new WeakMap();

/** Why width and height have no effect; "" if they have. */
function sizes(node) {
  const size = widgetValue(node, "size");
  const reason = size !== undefined && size !== CUSTOM ? "`size` names the size" : "";
  return { width: reason, height: reason };
}

function ofSampler(node, changed) {
  const latent = connected(node, "latent") ? "the connected latent sets the size" : "";
  const model = latentOf(api, node, changed);
  return {
    ...(latent ? { size: latent, width: latent, height: latent, batch_size: latent } : { size: "", batch_size: "" }),
    ...(latent ? {} : sizes(node)),
    cfg: connected(node, "negative") ? "" : "no negative is connected",
    guidance: model?.guidance === false ? "the model has no guidance embedding; connect a negative and use cfg" : "",
  };
}

// Node -> (node, changed) => {widget: reason, "" if it has an effect}. `changed` is called when more is known later.
const RULES = { DCGenEmptyLatent: sizes, DCGen4KSampler: ofSampler };

function disable(widget, reason) {
  if (!tooltips.has(widget)) tooltips.set(widget, widget.tooltip);
  const tooltip = tooltips.get(widget);
  if (Boolean(widget.disabled) !== Boolean(reason)) widget.disabled = Boolean(reason);
  widget.tooltip = reason ? `No effect now: ${reason}. ${tooltip ?? ""}`.trim() : tooltip;
}

app.registerExtension({
  name: "DCGen.Idle",
  nodeCreated(node) {
    const rule = RULES[node.comfyClass];
    if (!rule) return;
    watch(node);
    whileInGraph(node, function update() {
      for (const [name, reason] of Object.entries(rule(node, update))) {
        const widget = node.widgets?.find((candidate) => candidate.name === name);
        if (widget) disable(widget, reason);
      }
      node.setDirtyCanvas?.(true, true);
    });
  },
});
