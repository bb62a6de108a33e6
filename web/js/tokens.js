// A line on the empty-latent and sampler nodes: how many tokens the image costs, and how many fewer than at f8.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { latentOf, source, widgetValue } from "./model.js";

const NODES = ["DCGenEmptyLatent", "DCGen4KSampler"];
const F8_SIDE = 16; // f8 with patches of 2: what FLUX costs without DC-Gen

/** [width, height] in pixels of a node with a `size` choice and numbers, as they say. */
function pixels(node) {
  const named = String(widgetValue(node, "size") ?? "").match(/(\d+) x (\d+)$/);
  const numbers = named ? named.slice(1) : [widgetValue(node, "width"), widgetValue(node, "height")];
  return numbers.map(Number);
}

export function line(node, changed) {
  const empty = source(node, "latent") ?? node; // the sampler makes an empty latent itself when it is given none
  if (!NODES.includes(empty.comfyClass)) return "tokens: as the latent";
  const latent = latentOf(api, node, changed) ?? latentOf(api, empty, changed);
  if (!latent) return source(node, "model") ? "tokens: known once the model's files are here" : "connect a model to count tokens";
  const [width, height] = pixels(empty);
  const side = latent.factor * latent.patch;
  if (width % side || height % side) return `${width} x ${height}: this model needs multiples of ${side}`;
  const tokens = (width / side) * (height / side);
  const f8 = (width / F8_SIDE) * (height / F8_SIDE);
  const fewer = f8 / tokens;
  const told = `${width} x ${height} = ${tokens.toLocaleString("en")} tokens`;
  return fewer > 1 ? `${told}, ${+fewer.toFixed(1)}x fewer than f8` : told;
}

app.registerExtension({
  name: "DCGen.Tokens",
  nodeCreated(node) {
    if (!NODES.includes(node.comfyClass)) return;
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
    const widget = node.addDOMWidget("dcgen_tokens", "dcgen_tokens", box, {
      serialize: false,
      getMinHeight: () => 16,
      getMaxHeight: () => 16,
    });
    widget.serialize = false; // a line to read, no value of the graph
    node.setSize([node.size[0], Math.max(node.size[1], node.computeSize()[1])]);
    const update = () => {
      const text = line(node, update);
      if (box.textContent !== text) box.textContent = text;
    };
    // The size may be typed on another node, so the line is refreshed while the node is drawn.
    const drawn = node.onDrawForeground;
    node.onDrawForeground = function (...args) {
      update();
      return drawn?.apply(this, args);
    };
    setTimeout(update, 0);
  },
});
