// The graph that the page shows. Shared by the features beside it.
import { app } from "../../../scripts/app.js";

/** The node that the page or the server names so: "5", "SUBGRAPH:5", or the way to it from the root, "12:5". */
export function nodeAt(key) {
  let graph = app.rootGraph ?? app.graph;
  let node = null;
  for (const part of String(key).split(":")) {
    const subgraph = graph?.subgraphs.get(part);
    node = subgraph ? null : graph?.getNodeById(part);
    graph = subgraph ?? node?.subgraph;
  }
  return node;
}
