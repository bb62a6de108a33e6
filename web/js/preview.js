// Removes the preview image of DC-AE Decode when it has finished: in classic nodes it would stay, and the node would
// remain tall enough to cover the nodes below it.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { nodeAt } from "./graph.js";

const WIDGET = "$$canvas-image-preview"; // the frontend's name of the widget
const WAIT = 500; // for an image that still arrives
const running = new Map(); // node -> its size before the preview

/** `id`: the node that runs now, or null. */
function follow(id) {
  const now = id == null ? null : nodeAt(id);
  for (const [node, size] of running) {
    if (node === now) continue;
    running.delete(node);
    setTimeout(clear, WAIT, node, size);
  }
  if (now?.comfyClass === "DCAEDecode" && !running.has(now)) running.set(now, [...now.size]);
}

function clear(node, size) {
  if (running.has(node)) return; // runs again
  node.imgs = undefined;
  const slot = node.widgets?.findIndex((widget) => widget.name === WIDGET) ?? -1;
  if (slot < 0) return;
  node.widgets[slot].onRemove?.();
  node.widgets.splice(slot, 1);
  node.setSize(size);
  node.graph?.setDirtyCanvas(true, true);
}

app.registerExtension({
  name: "DCGen.Preview",
  setup() {
    api.addEventListener("executing", ({ detail }) => follow(detail));
    for (const end of ["execution_error", "execution_interrupted"]) api.addEventListener(end, () => follow(null));
  },
});
