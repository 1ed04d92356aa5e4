// What the drivers for Node share; the protocol is that of drive.py. They run in the folder that holds
// node_modules. A job gets its arguments, `tell` for each piece, and the signal that cancels it.

import { createRequire } from "node:module";
import { createInterface } from "node:readline";

export const load = createRequire(process.cwd() + "/");
export const TIMEOUT = 20_000;
export const SUNNY = "22 degrees";
export const PLACE = { type: "object", properties: { place: { type: "string" } }, required: ["place"] };
export const WEATHER = { name: "weather", description: "The weather of a place", parameters: PLACE };
export const user = (text) => [{ role: "user", content: text }];

const say = (news) => process.stdout.write(JSON.stringify(news) + "\n");

function told(error) {
  const kinds = [];
  for (let at = Object.getPrototypeOf(error); at && at !== Object.prototype; at = Object.getPrototypeOf(at)) {
    kinds.push(at.constructor.name);
  }
  if (!kinds.includes(error.name)) kinds.push(error.name);
  const { status, status_code, code, requestID } = error;
  const seen = { kind: kinds[0], kinds, text: String(error.message).slice(0, 500) };
  return { ...seen, name: error.name, status_code: status ?? status_code, code, request_id: requestID };
}

// A promise that nobody waits for, as in a library's own clean-up: told, so that no test passes over it.
process.on("unhandledRejection", (error) => say({ unhandled: told(error) }));

export function serve(jobs) {
  const controls = new Map();
  const perform = async ({ id, job, ...wanted }) => {
    const control = new AbortController();
    controls.set(id, control);
    const tell = (piece) => say({ id, piece });
    try {
      say({ id, done: await jobs[job]({ ...wanted, tell, signal: control.signal }) });
    } catch (error) {
      say({ id, raised: told(error) });
    }
  };
  say({ ready: true });
  const lines = createInterface({ input: process.stdin });
  lines.on("line", (line) => {
    const wanted = JSON.parse(line);
    if ("cancel" in wanted) controls.get(wanted.cancel).abort();
    else perform(wanted);
  });
  lines.on("close", () => process.exit(0));
}
