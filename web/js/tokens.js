// A line on the empty-latent and sampler nodes: the number of tokens of the image, and the saving over f8.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { refresh, watch, whileInGraph } from "./changes.js";
import { connected, forget, latentOf, source, widgetValue } from "./model.js";

const NODES = ["DCGenEmptyLatent", "DCGen4KSampler"];
const LOADERS = ["DCGenReleaseLoader", "DCGenModelLoader", "DCGenApply"];
const F8_SIDE = 16; // f8 with patch size 2, as in FLUX without DC-Gen
const UNKNOWN = "tokens: depends on what is linked";

/** [width, height] in pixels from a node's `size`, `width` and `height`; NaN if one is linked. */
function pixels(node) {
  const size = widgetValue(node, "size");
  if (size === undefined) return [NaN, NaN];
  const named = String(size).match(/(\d+) x (\d+)$/);
  const numbers = named ? named.slice(1) : [widgetValue(node, "width"), widgetValue(node, "height")];
  return numbers.map(Number);
}

/** The node that sets the image size: the sampler makes its own empty latent when none is connected. */
function sized(node) {
  const latent = source(node, "latent");
  return latent === null ? node : latent?.node;
}

export function line(node, changed) {
  if (connected(node, "image") && widgetValue(node, "denoise") >= 1) return "the image has no effect at denoise 1";
  const empty = sized(node);
  if (!empty) return UNKNOWN;
  if (!NODES.includes(empty.comfyClass)) return "tokens: as the latent";
  const latent = latentOf(api, node, changed);
  if (latent === null) return "connect a model to count tokens";
  if (!latent) return UNKNOWN;
  if (latent.missing) return "tokens: model not installed";
  return count(latent, ...pixels(empty));
}

function count(latent, width, height) {
  if (Number.isNaN(width + height)) return UNKNOWN;
  const side = latent.factor * latent.patch;
  if (width % side || height % side) return `${width} x ${height}: this model needs multiples of ${side}`;
  const tokens = (width / side) * (height / side);
  const fewer = ((width / F8_SIDE) * (height / F8_SIDE)) / tokens;
  const text = `${width} x ${height} = ${tokens.toLocaleString("en")} tokens`;
  return fewer > 1 ? `${text}, ${+fewer.toFixed(1)}x fewer than f8` : text;
}

function addLine(node) {
  const box = document.createElement("div");
  box.className = "dcgen-tokens";
  Object.assign(box.style, {
    font: "11px sans-serif",
    color: "var(--descrip-text, #999)",
    textAlign: "center",
    overflow: "hidden",
    whiteSpace: "nowrap",
    textOverflow: "ellipsis",
  });
  const height = () => 16;
  const options = { serialize: false, getMinHeight: height, getMaxHeight: height };
  const widget = node.addDOMWidget("dcgen_tokens", "dcgen_tokens", box, options);
  widget.serialize = false; // display only
  node.setSize([node.size[0], Math.max(node.size[1], node.computeSize()[1])]);
  const update = () => {
    const text = line(node, update);
    if (box.textContent !== text) box.textContent = text;
  };
  whileInGraph(node, update);
}

app.registerExtension({
  name: "DCGen.Tokens",
  nodeCreated(node) {
    if (NODES.includes(node.comfyClass)) addLine(node);
    if (NODES.includes(node.comfyClass) || LOADERS.includes(node.comfyClass)) watch(node);
  },
  refreshComboInNodes() {
    forget();
    refresh();
  },
});
