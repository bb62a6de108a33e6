// When a graph is opened: which of its models are not installed, and the command that downloads each published one.
import { app } from "../../../scripts/app.js";

// Node -> its widget, and where such files belong.
const LOADERS = {
  DCGenReleaseLoader: { widget: "release", folder: "models/diffusers" },
  DCGenModelLoader: { widget: "model_name", folder: "models/diffusion_models" }, // files; folders are published
  DCGenApply: { widget: "adapter_name", folder: "models/model_patches" },
  DCAELoader: { widget: "vae_name", folder: "models/vae" },
};
// Beginning of a published name -> its owner on the hub, ending of the repository's name, and folder.
const PUBLISHED = [
  { begins: "DC-Gen-FLUX", owner: "dc-ai", ending: "", folder: "models/diffusers" },
  { begins: "Sana_", owner: "Efficient-Large-Model", ending: "", folder: "models/diffusers" },
  { begins: "SANA1.5_", owner: "Efficient-Large-Model", ending: "", folder: "models/diffusers" },
  { begins: "dc-ae-1.5-", owner: "dc-ai", ending: "-diffusers", folder: "models/vae" },
  { begins: "dc-ae-", owner: "mit-han-lab", ending: "-diffusers", folder: "models/vae" },
];

const RUN = "Run the hf commands in ComfyUI's folder, then";
const isCommand = (line) => line.startsWith("hf ");

/** What to do about a model that is not there. */
function remedy(name, folder) {
  const isFile = name.endsWith(".safetensors"); // what is published are folders
  const repository = !isFile && PUBLISHED.find(({ begins }) => name.startsWith(begins));
  if (!repository) return `${name}: put it into ${folder}`;
  return `hf download ${repository.owner}/${name}${repository.ending} --local-dir ${repository.folder}/${name}`;
}

function allNodes(graph) {
  return graph.nodes.flatMap((node) => (node.subgraph ? [node, ...allNodes(node.subgraph)] : [node]));
}

/** The lines on models that nodes of the open graph name and their lists do not have, each once. */
export function missing() {
  const lines = allNodes(app.rootGraph ?? app.graph).flatMap((node) => {
    const loader = LOADERS[node.comfyClass];
    const widget = loader && node.widgets?.find((one) => one.name === loader.widget);
    const linked = node.inputs?.some((input) => input.name === loader?.widget && input.link != null);
    const values = widget?.options?.values;
    if (!widget || linked || !Array.isArray(values) || values.includes(widget.value) || !widget.value) return [];
    return [remedy(String(widget.value), loader.folder)];
  });
  return [...new Set(lines)];
}

let shown = null; // of the open graph, until another is opened or its models are there

/** Say what the open graph misses, instead of what was said before. */
function tell() {
  const { toast } = app.extensionManager;
  if (shown) toast.remove(shown);
  const lines = missing();
  shown = lines.length
    ? {
        severity: "warn",
        summary: "DC-Gen: this workflow needs models that are not installed",
        detail: [...lines, `${lines.some(isCommand) ? RUN : "Then"} press R to refresh the lists.`].join("\n"),
      }
    : null;
  if (shown) toast.add(shown);
}

app.registerExtension({
  name: "DCGen.Missing",
  async afterConfigureGraph() {
    tell();
  },
  async refreshComboInNodes() {
    if (shown) setTimeout(tell); // the page changes the lists around this call
  },
});
