// What changes in the graph that the page shows, told to the features beside it.
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

/** Tell the listeners, once what is being done to the graph is done. */
export function refresh() {
  if (due) return;
  due = true;
  setTimeout(() => {
    due = false;
    listeners.forEach((update) => update());
  }, 0);
}

/** Report the changes of a node's widgets and links. */
export function watch(node) {
  if (watched.has(node)) return;
  watched.add(node);
  for (const widget of node.widgets ?? []) {
    const callback = widget.callback;
    widget.callback = function (...args) {
      const answer = callback?.apply(this, args);
      refresh();
      return answer;
    };
  }
  const connected = node.onConnectionsChange;
  node.onConnectionsChange = function (...args) {
    connected?.apply(this, args);
    refresh();
  };
}

/** Call `update` while the node is in a graph, at each change. */
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
    // What is changed on other packs' nodes between a feature's node and its model: both node renderers report it here.
    api.addEventListener("graphChanged", refresh);
  },
  nodeCreated: refresh, // one more use of a subgraph changes what is shown inside it
  afterConfigureGraph: refresh,
});
