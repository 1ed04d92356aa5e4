// What the official OpenAI client for Node gets from a counting model: client.mjs BASE_URL, in the folder
// that holds node_modules. It does and prints the same as client.py.

import { createRequire } from "node:module";

const OpenAI = createRequire(process.cwd() + "/")("openai");
const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0, timeout: 20_000 });

const ask = (text, more) => ({ model: "counter", messages: [{ role: "user", content: text }], ...more });

async function models() {
  const ids = [];
  for await (const model of await client.models.list()) ids.push(model.id);
  return ids;
}

async function whole() {
  const answer = await client.chat.completions.create(ask("go 990"));
  const [choice] = answer.choices;
  return { text: choice.message.content, finish: choice.finish_reason, tokens: answer.usage.completion_tokens };
}

async function stream() {
  const wanted = ask("hello", { max_tokens: 40, stream: true, stream_options: { include_usage: true } });
  const seen = { pieces: [], finish: [], tokens: [] };
  for await (const chunk of await client.chat.completions.create(wanted)) {
    if (chunk.usage) seen.tokens.push(chunk.usage.completion_tokens);
    for (const choice of chunk.choices) {
      if (choice.delta.content) seen.pieces.push(choice.delta.content);
      if (choice.finish_reason) seen.finish.push(choice.finish_reason);
    }
  }
  return seen;
}

async function unknown() {
  try {
    await client.chat.completions.create({ ...ask("hello"), model: "nobody" });
  } catch (error) {
    return { kind: error.constructor.name, status: error.status, code: error.code };
  }
  return {};
}

async function leave() {
  const answer = await client.chat.completions.create(ask("hello", { max_tokens: 900, stream: true }));
  let seen = 0;
  for await (const chunk of answer) {
    if (chunk.choices[0]?.delta.content) seen += 1;
    if (seen === 3) break; // the client aborts the request
  }
}

const seen = { models: await models(), whole: await whole(), stream: await stream(), unknown: await unknown() };
console.log(JSON.stringify(seen));
await leave();
console.log("left");
process.stdin.resume();
await new Promise((resolve) => process.stdin.on("end", resolve));
process.exit(0);
