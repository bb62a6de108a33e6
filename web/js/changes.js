// Notifies the other scripts of changes of the graph on the page.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

const listeners = new Set();
const watched = new WeakSet();
let due = false;

/** Call `update` after each change of the graph, until `unlisten` is called with it. */
export function listen(update) {
  listeners.add(update);
}

export function unlisten(update) {
  listeners.delete(update);
}

/** Call the listeners, once, after the current change of the graph. */
export function refresh() {
  if (due) return;
  due = true;
  setTimeout(() => {
    due = false;
    listeners.forEach((update) => update());
  }, 0);
}

/** Call `refresh` when a widget of a node changes, or one of its links is added or removed. */
export function watch(node) {
  if (watched.has(node)) return;
  watched.add(node);
  for (const widget of node.widgets ?? []) {
    const callback = widget.callback;
    widget.callback = function (...args) {
      const result = callback?.apply(this, args);
      refresh();
      return result;
    };
  }
  const connected = node.onConnectionsChange;
  node.onConnectionsChange = function (...args) {
    connected?.apply(this, args);
    refresh();
  };
}

/** Call `update` after each change, as long as the node is in a graph. */
export function whileInGraph(node, update) {
  const { onAdded, onRemoved } = node;
  node.onAdded = function (...args) {
    onAdded?.apply(this, args);
    listen(update);
    refresh();
  };
  node.onRemoved = function (...args) {
    onRemoved?.apply(this, args);
    unlisten(update);
  };
}

app.registerExtension({
  name: "DCGen.Changes",
  setup() {
    // For changes on other packs' nodes between our node and its model; sent by both node renderers.
    api.addEventListener("graphChanged", refresh);
  },
  nodeCreated: refresh, // a second instance of a subgraph changes what is shown inside it
  afterConfigureGraph: refresh,
});
