// The source of a node's input, and the latent of the model connected to it; shared by the other scripts.
//
// In this file null means "not connected" and undefined "unknown".

const MUTED = 2;
const BYPASSED = 4;
const MAX_HOPS = 64; // a graph with a loop must not hang the page

// Loaders whose latent is looked up by the name of the loaded file. `autoencoder`: the latent of a file that does not
// name its own, as a widget or a fixed name.
const NAMED_BY = {
  DCGenReleaseLoader: { kind: "release", widget: "release" },
  DCGenModelLoader: { kind: "model", widget: "model_name", autoencoder: { widget: "autoencoder" } },
  DCGenApply: { kind: "adapter", widget: "adapter_name" },
  UNETLoader: { kind: "model", widget: "unet_name", autoencoder: { name: "flux-f8c16" } },
};
const FIXED = { NunchakuFluxDiTLoader: { factor: 8, patch: 2 } };

const known = new Map();
const waiting = new Map();

/** {node, slot}: the output connected to an input, through subgraphs, reroutes and bypassed nodes. */
export function source(node, name) {
  return sourceOf(node, slotOf(node, name), 0);
}

/** The value of a widget; undefined if a link replaces it, because linked values are only known at run time. */
export function widgetValue(node, name) {
  const slot = slotOf(node, name);
  if (slot >= 0 && linkInto(node, slot)) return undefined;
  return node?.widgets?.find((widget) => widget.name === name)?.value;
}

/** Whether an input is linked. */
export function connected(node, name) {
  const slot = slotOf(node, name);
  return slot >= 0 && Boolean(linkInto(node, slot));
}

/** {factor, patch, guidance} of the model connected to an input, or {missing: true} if its file is missing. `changed` is
 * called when an answer arrives later. */
export function latentOf(api, node, changed, name = "model") {
  return latentAt(api, source(node, name), changed, 0);
}

/** Clear the cache, so that files are read again. */
export function forget() {
  known.clear();
}

function slotOf(node, name) {
  return node?.inputs?.findIndex((input) => input.name === name) ?? -1;
}

/** The base class's method: subgraph nodes override it to return a link inside the subgraph. */
function linkInto(node, slot) {
  return node.graph ? LiteGraph.LGraphNode.prototype.getInputLink.call(node, slot) : null;
}

function sourceOf(node, slot, hops) {
  const link = slot < 0 ? null : linkInto(node, slot);
  if (!link) return null;
  if (hops > MAX_HOPS) return undefined;
  return link.originIsIoNode ? outside(node.graph, link.origin_slot, hops + 1) : output(node.graph, link, hops + 1);
}

/** The source of a subgraph's input, from inside; unknown for a subgraph that is used more than once. */
function outside(subgraph, slot, hops) {
  const root = subgraph.rootGraph;
  const graphs = [root, ...root.subgraphs.values()];
  const users = graphs.flatMap((graph) => graph.nodes.filter((node) => node.subgraph === subgraph));
  return users.length === 1 ? sourceOf(users[0], slot, hops) : undefined;
}

function output(graph, link, hops) {
  const node = graph.getNodeById(link.origin_id);
  if (!node || node.mode === MUTED) return undefined;
  if (node.mode === BYPASSED) return through(node, node.outputs[link.origin_slot]?.type, hops);
  if (node.subgraph) return inside(node.subgraph, link.origin_slot, hops);
  if (!node.isVirtualNode) return { node, slot: link.origin_slot };
  // A reroute has one input and one output. Other virtual nodes (Get/Set) work differently.
  return node.inputs?.length === 1 && node.outputs?.length === 1 ? sourceOf(node, 0, hops) : undefined;
}

function inside(subgraph, slot, hops) {
  const link = subgraph.outputNode.slots[slot]?.getLinks()[0];
  if (!link) return null;
  return link.originIsIoNode ? outside(subgraph, link.origin_slot, hops) : output(subgraph, link, hops);
}

/** A bypassed node passes on an input of its output's type; if there are several, the frontend's choice is unknown. */
function through(node, type, hops) {
  const slots = (node.inputs ?? []).flatMap((input, slot) => (input.type === type ? [slot] : []));
  return slots.length === 1 ? sourceOf(node, slots[0], hops) : undefined;
}

function latentAt(api, origin, changed, hops) {
  if (!origin || hops > MAX_HOPS) return hops > MAX_HOPS ? undefined : origin;
  const { node } = origin;
  if (FIXED[node.comfyClass]) return FIXED[node.comfyClass];
  if (NAMED_BY[node.comfyClass]) return named(api, node, NAMED_BY[node.comfyClass], changed);
  // Nodes that change a model (LoRA, shift, merge) keep its latent.
  const answers = (node.inputs ?? [])
    .filter((input) => input.type === "MODEL")
    .map((input) => latentAt(api, source(node, input.name), changed, hops + 1))
    .filter((answer) => answer !== null);
  const agree = answers.every((answer) => answer?.factor === answers[0]?.factor && answer?.patch === answers[0]?.patch);
  return agree ? answers[0] : undefined;
}

function named(api, node, { kind, widget, autoencoder }, changed) {
  const name = widgetValue(node, widget);
  if (name === undefined) return undefined;
  const query = new URLSearchParams({ kind, name });
  if (autoencoder) query.set("autoencoder", autoencoder.name ?? widgetValue(node, autoencoder.widget) ?? "");
  return ask(api, String(query), changed);
}

function ask(api, query, changed) {
  if (known.has(query)) return known.get(query);
  if (!waiting.has(query)) {
    waiting.set(query, new Set());
    api
      .fetchApi(`/dcgen/latent?${query}`)
      .then((response) => (response.ok ? response.json() : response.status === 404 ? { missing: true } : undefined))
      .then((latent) => known.set(query, latent))
      .catch(() => known.set(query, undefined))
      .finally(() => {
        const listeners = waiting.get(query);
        waiting.delete(query);
        listeners.forEach((listener) => listener());
      });
  }
  waiting.get(query).add(changed);
  return undefined;
}
