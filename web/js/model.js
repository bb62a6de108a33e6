// What an input of a node is fed by, and the latent of the model behind it. Shared by the features beside it.
//
// Everywhere here null means "nothing is connected" and undefined "that cannot be told".

const MUTED = 2;
const BYPASSED = 4;
const MOST_HOPS = 64; // a graph with a loop must not hang the page

// Loaders whose latent is known by the name of what they load. `autoencoder`: widget with the latent of a file that does
// not say its own, or that latent itself.
const NAMED_BY = {
  DCGenReleaseLoader: { kind: "release", widget: "release" },
  DCGenModelLoader: { kind: "model", widget: "model_name", autoencoder: { widget: "autoencoder" } },
  DCGenApply: { kind: "adapter", widget: "adapter_name" },
  UNETLoader: { kind: "model", widget: "unet_name", autoencoder: { name: "flux-f8c16" } },
};
const FIXED = { NunchakuFluxDiTLoader: { factor: 8, patch: 2 } };

const known = new Map();
const waiting = new Map();

/** {node, slot}: the output that feeds an input, seen through subgraphs, reroutes and bypassed nodes. */
export function source(node, name) {
  return sourceOf(node, slotOf(node, name), 0);
}

/** The value of a widget; undefined where a link replaces it, because what comes through a link is known at run time. */
export function widgetValue(node, name) {
  const slot = slotOf(node, name);
  if (slot >= 0 && linkInto(node, slot)) return undefined;
  return node?.widgets?.find((widget) => widget.name === name)?.value;
}

/** Whether anything is linked to an input. */
export function connected(node, name) {
  const slot = slotOf(node, name);
  return slot >= 0 && Boolean(linkInto(node, slot));
}

/** {factor, patch, guidance} of the model behind an input, or {missing: true} while its file is not there. `changed`
 * runs when an answer arrives later. */
export function latentOf(api, node, changed, name = "model") {
  return latentAt(api, source(node, name), changed, 0);
}

/** Forget what files said, so that they are read anew. */
export function forget() {
  known.clear();
}

function slotOf(node, name) {
  return node?.inputs?.findIndex((input) => input.name === name) ?? -1;
}

/** Subgraph nodes give a link of their inside by the same name of method, hence the class's own. */
function linkInto(node, slot) {
  return node.graph ? LiteGraph.LGraphNode.prototype.getInputLink.call(node, slot) : null;
}

function sourceOf(node, slot, hops) {
  const link = slot < 0 ? null : linkInto(node, slot);
  if (!link) return null;
  if (hops > MOST_HOPS) return undefined;
  return link.originIsIoNode ? outside(node.graph, link.origin_slot, hops + 1) : output(node.graph, link, hops + 1);
}

/** What feeds an input of a subgraph, seen from within. A subgraph that is used twice has two answers, hence none. */
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
  // A reroute has one input and one output. Other nodes of the page alone (Get of a Set) have rules of their own.
  return node.inputs?.length === 1 && node.outputs?.length === 1 ? sourceOf(node, 0, hops) : undefined;
}

function inside(subgraph, slot, hops) {
  const link = subgraph.outputNode.slots[slot]?.getLinks()[0];
  if (!link) return null;
  return link.originIsIoNode ? outside(subgraph, link.origin_slot, hops) : output(subgraph, link, hops);
}

/** A bypassed node hands on an input of its output's type; which one of several is the frontend's business. */
function through(node, type, hops) {
  const slots = (node.inputs ?? []).flatMap((input, slot) => (input.type === type ? [slot] : []));
  return slots.length === 1 ? sourceOf(node, slots[0], hops) : undefined;
}

function latentAt(api, found, changed, hops) {
  if (!found || hops > MOST_HOPS) return hops > MOST_HOPS ? undefined : found;
  const { node } = found;
  if (FIXED[node.comfyClass]) return FIXED[node.comfyClass];
  if (NAMED_BY[node.comfyClass]) return named(api, node, NAMED_BY[node.comfyClass], changed);
  // A node that changes a model (LoRA, shift, merge) leaves its latent as it is.
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
      .then((answer) => (answer.ok ? answer.json() : answer.status === 404 ? { missing: true } : undefined))
      .then((found) => known.set(query, found))
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
