// The wipe of DCGenCompare: two images on top of each other, the upper one clipped at the pointer.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { nodeAt } from "./graph.js";

const CSS = `
.dcgen-wipe { position: relative; width: 100%; height: 100%; min-height: 160px; overflow: hidden; cursor: ew-resize;
  background: #0004; user-select: none; touch-action: none; }
.dcgen-wipe img { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain; pointer-events: none; }
.dcgen-wipe img:not([src]) { display: none; }
.dcgen-wipe .line { position: absolute; top: 0; bottom: 0; width: 2px; background: #fffc; pointer-events: none; }
.dcgen-wipe .name { position: absolute; top: 6px; padding: 1px 6px; font: 11px sans-serif; color: #fff;
  background: #0008; border-radius: 3px; pointer-events: none; }
.dcgen-wipe button { position: absolute; bottom: 6px; padding: 1px 8px; }
`;
const views = new Map();

function address(image) {
  const query = new URLSearchParams({ filename: image.filename, subfolder: image.subfolder, type: image.type });
  return api.apiURL(`/view?${query}`);
}

/** [a, b] for each image of the longer batch; the last image of the shorter one is repeated. */
function paired(first, second) {
  if (!first?.length || !second?.length) return [];
  const pick = (images, i) => images[Math.min(i, images.length - 1)];
  return Array.from({ length: Math.max(first.length, second.length) }, (_, i) => [pick(first, i), pick(second, i)]);
}

function wipe() {
  const box = document.createElement("div");
  box.className = "dcgen-wipe";
  box.tabIndex = 0;
  box.setAttribute("role", "slider");
  box.setAttribute("aria-label", "wipe between the two images");
  const [b, a] = [new Image(), new Image()];
  const line = Object.assign(document.createElement("div"), { className: "line" });
  const names = ["A", "B"].map((text) => Object.assign(document.createElement("div"), { className: "name", textContent: text }));
  names[0].style.left = names[1].style.right = "6px";
  const next = Object.assign(document.createElement("button"), { hidden: true });
  next.style.right = "6px";
  box.append(b, a, line, ...names, next);

  let pairs = [];
  let shown = 0;
  const moveTo = (share) => {
    const percent = Math.min(100, Math.max(0, share * 100));
    a.style.clipPath = `inset(0 ${100 - percent}% 0 0)`;
    line.style.left = `calc(${percent}% - 1px)`;
    box.setAttribute("aria-valuenow", String(Math.round(percent)));
  };
  const show = (index) => {
    shown = index;
    for (const [element, image] of [[a, pairs[index]?.[0]], [b, pairs[index]?.[1]]]) {
      if (image) element.src = address(image);
      else element.removeAttribute("src");
    }
    next.textContent = `${index + 1} / ${pairs.length}`;
  };
  box.addEventListener("pointermove", (event) => {
    const area = box.getBoundingClientRect();
    moveTo((event.clientX - area.left) / area.width);
  });
  box.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -5, ArrowRight: 5 }[event.key];
    if (!step) return;
    moveTo((Number(box.getAttribute("aria-valuenow")) + step) / 100);
    event.stopPropagation();
  });
  next.addEventListener("click", () => show((shown + 1) % pairs.length));
  moveTo(0.5);
  let current = "[]";
  return {
    box,
    set(output) {
      const received = paired(output?.a_images, output?.b_images);
      if (JSON.stringify(received) === current) return;
      current = JSON.stringify(received);
      pairs = received;
      next.hidden = pairs.length < 2;
      show(0);
    },
  };
}

/** Show the outputs that the page stores per node: they survive undo and tab switches, and come with history jobs. */
function showStored(outputs = app.nodeOutputs) {
  const stored = new Map(Object.entries(outputs ?? {}).map(([key, output]) => [nodeAt(key), output]));
  views.forEach((view, node) => view.set(stored.get(node)));
}

function addWipe(node) {
  const view = wipe();
  const options = { serialize: false, getMinHeight: () => 160 };
  node.addDOMWidget("dcgen_wipe", "dcgen_wipe", view.box, options).serialize = false;
  node.setSize([Math.max(node.size[0], 360), Math.max(node.size[1], 380)]);
  const { onAdded, onRemoved, onExecuted } = node;
  node.onAdded = function (...args) {
    onAdded?.apply(this, args);
    views.set(this, view);
    setTimeout(showStored, 0); // a node restored by undo or paste gets its id only after this call
  };
  node.onRemoved = function (...args) {
    onRemoved?.apply(this, args);
    views.delete(this);
  };
  node.onExecuted = function (output) {
    onExecuted?.apply(this, arguments);
    view.set(output);
  };
}

app.registerExtension({
  name: "DCGen.Compare",
  setup() {
    document.head.append(Object.assign(document.createElement("style"), { textContent: CSS }));
  },
  nodeCreated(node) {
    if (node.comfyClass === "DCGenCompare") addWipe(node);
  },
  afterConfigureGraph: () => showStored(),
  onNodeOutputsUpdated: (outputs) => showStored(outputs),
});
