// Access to the graph on the page, shared by the other scripts.
import { app } from "../../../scripts/app.js";

/** The node of an id as the page or the server writes it: "5", "SUBGRAPH:5", or its path from the root, "12:5". */
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
