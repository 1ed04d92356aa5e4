// Files and batches by the official OpenAI library for Node, as drive.py tells it.

import { load, serve, TIMEOUT } from "./drive.mjs";

const OpenAI = load("openai");
const ENDS = ["completed", "failed", "cancelled", "expired"];
const POLL_MS = 50;

// No attempt is repeated, so that a failure is seen.
const client = (url) =>
  new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0, timeout: TIMEOUT });

async function upload({ url, name, text }) {
  const file = await OpenAI.toFile(Buffer.from(text), name);
  return client(url).files.create({ file, purpose: "batch" });
}

const create = ({ url, file, metadata }) =>
  client(url).batches.create({
    input_file_id: file,
    endpoint: "/v1/chat/completions",
    completion_window: "24h",
    metadata,
  });

// The batch once it has ended.
async function poll({ url, batch }) {
  const there = client(url).batches;
  for (;;) {
    const found = await there.retrieve(batch);
    if (ENDS.includes(found.status)) return found;
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
  }
}

const retrieve = ({ url, batch }) => client(url).batches.retrieve(batch);
const cancel = ({ url, batch }) => client(url).batches.cancel(batch);
const file = ({ url, ident }) => client(url).files.retrieve(ident);
const remove = ({ url, ident }) => client(url).files.delete(ident);

async function content({ url, ident }) {
  return (await client(url).files.content(ident)).text();
}

// The ids of all of them: the library asks for page after page by itself.
async function listed({ url, what, query }) {
  const ids = [];
  for await (const one of client(url)[what].list(query)) ids.push(one.id);
  return ids;
}

serve({ upload, create, poll, retrieve, cancel, file, content, delete: remove, listed });
