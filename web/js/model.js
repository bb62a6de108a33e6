// What a node's model samples in, found by following its MODEL input to the loader. Shared by the features beside it.

const BASE = { factor: 8, patch: 2 };
const NAMED_BY = {
  DCGenReleaseLoader: { kind: "release", widget: "release" },
  DCGenModelLoader: { kind: "model", widget: "model_name" },
  DCGenApply: { kind: "adapter", widget: "adapter_name" },
};
const known = new Map();
const waiting = new Map();

/** The node that an input is connected to, or null. */
export function source(node, name) {
  const slot = node?.inputs?.findIndex((input) => input.name === name) ?? -1;
  return slot < 0 ? null : node.getInputNode(slot);
}

export function widgetValue(node, name) {
  return node?.widgets?.find((widget) => widget.name === name)?.value;
}

/** {factor, patch} of the model behind `node`'s input; `changed` runs when an answer arrives later. Null if unknown. */
export function latentOf(api, node, changed, input = "model") {
  let at = source(node, input);
  for (let hops = 0; at && hops < 64; hops++) {
    const named = NAMED_BY[at.comfyClass];
    if (named) return ask(api, named.kind, widgetValue(at, named.widget), changed);
    const next = at.inputs?.find((slot) => slot.type === "MODEL" || slot.name === "");
    if (!next) return BASE;
    at = source(at, next.name);
  }
  return null;
}

function ask(api, kind, name, changed) {
  if (!name) return null;
  const key = `${kind}:${name}`;
  if (known.has(key)) return known.get(key);
  if (!waiting.has(key)) {
    waiting.set(key, new Set());
    api
      .fetchApi(`/dcgen/latent?kind=${kind}&name=${encodeURIComponent(name)}`)
      .then((answer) => (answer.ok ? answer.json() : null))
      .then((found) => known.set(key, found))
      .catch(() => known.set(key, null))
      .finally(() => {
        const listeners = waiting.get(key);
        waiting.delete(key);
        listeners.forEach((listener) => listener());
      });
  }
  waiting.get(key).add(changed);
  return null;
}
