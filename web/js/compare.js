// The wipe of DCGenCompare: two pictures on top of each other, the upper one cut where the pointer is.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

const CSS = `
.dcgen-wipe { position: relative; width: 100%; height: 100%; min-height: 160px; overflow: hidden; cursor: ew-resize;
  background: #0004; user-select: none; touch-action: none; }
.dcgen-wipe img { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain; pointer-events: none; }
.dcgen-wipe .line { position: absolute; top: 0; bottom: 0; width: 2px; background: #fffc; pointer-events: none; }
.dcgen-wipe .name { position: absolute; top: 6px; padding: 1px 6px; font: 11px sans-serif; color: #fff;
  background: #0008; border-radius: 3px; pointer-events: none; }
.dcgen-wipe button { position: absolute; bottom: 6px; padding: 1px 8px; }
`;

function address(image) {
  const query = new URLSearchParams({ filename: image.filename, subfolder: image.subfolder, type: image.type });
  return api.apiURL(`/view?${query}`);
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
  const at = (share) => {
    const percent = Math.min(100, Math.max(0, share * 100));
    a.style.clipPath = `inset(0 ${100 - percent}% 0 0)`;
    line.style.left = `calc(${percent}% - 1px)`;
    box.setAttribute("aria-valuenow", String(Math.round(percent)));
  };
  const show = (index) => {
    shown = index;
    a.src = address(pairs[index][0]);
    b.src = address(pairs[index][1]);
    next.textContent = `${index + 1} / ${pairs.length}`;
  };
  box.addEventListener("pointermove", (event) => {
    const area = box.getBoundingClientRect();
    at((event.clientX - area.left) / area.width);
  });
  box.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -5, ArrowRight: 5 }[event.key];
    if (!step) return;
    at((Number(box.getAttribute("aria-valuenow")) + step) / 100);
    event.stopPropagation();
  });
  next.addEventListener("click", () => show((shown + 1) % pairs.length));
  at(0.5);
  return {
    box,
    set(first, second) {
      pairs = first.map((image, i) => [image, second[Math.min(i, second.length - 1)]]);
      next.hidden = pairs.length < 2;
      if (pairs.length) show(0);
    },
  };
}

app.registerExtension({
  name: "DCGen.Compare",
  setup() {
    document.head.append(Object.assign(document.createElement("style"), { textContent: CSS }));
  },
  nodeCreated(node) {
    if (node.comfyClass !== "DCGenCompare") return;
    const view = wipe();
    const widget = node.addDOMWidget("dcgen_wipe", "dcgen_wipe", view.box, {
      serialize: false,
      getMinHeight: () => 160,
    });
    widget.serialize = false;
    node.setSize([Math.max(node.size[0], 360), Math.max(node.size[1], 380)]);
    const executed = node.onExecuted;
    node.onExecuted = function (output) {
      executed?.apply(this, arguments);
      if (output?.a_images && output?.b_images) view.set(output.a_images, output.b_images);
    };
  },
});
