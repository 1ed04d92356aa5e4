// The official Anthropic library for Node, as drive.py tells it.

import { load, PLACE, serve, SUNNY, TIMEOUT, user, WEATHER } from "./drive.mjs";

const Anthropic = load("@anthropic-ai/sdk");
const TOOLS = [{ name: WEATHER.name, description: WEATHER.description, input_schema: PLACE }];

// No attempt is repeated, so that a failure is seen.
const client = (url, timeout) =>
  new Anthropic({
    baseURL: url,
    apiKey: "none",
    maxRetries: 0,
    timeout: timeout ? timeout * 1000 : TIMEOUT,
  });

const request = (model, text, limit) => ({ model, messages: user(text), max_tokens: limit ?? 2000 });

function ended(answer) {
  const text = answer.content.map((block) => block.text ?? "").join("");
  return { text, finish: answer.stop_reason, tokens: answer.usage.output_tokens };
}

async function models({ url }) {
  const ids = [];
  for await (const model of client(url).models.list()) ids.push(model.id);
  return ids;
}

async function whole({ url, model, text, limit, timeout, signal }) {
  return ended(await client(url, timeout).messages.create(request(model, text, limit), { signal }));
}

async function stream({ url, model, text, limit, timeout, signal, tell }) {
  const answer = client(url, timeout).messages.stream(request(model, text, limit), { signal });
  answer.on("text", tell);
  return ended(await answer.finalMessage());
}

async function count({ url, model, text }) {
  return (await client(url).messages.countTokens({ model, messages: user(text) })).input_tokens;
}

// The model asks for a tool, is told its result, and answers.
async function tools({ url, model, stream }) {
  const asked = client(url).messages;
  const messages = user("How warm is it in Rome?");
  const wanted = { model, messages, tools: TOOLS, max_tokens: 100 };
  const first = stream ? await asked.stream(wanted).finalMessage() : await asked.create(wanted);
  const [call] = first.content.filter((block) => block.type === "tool_use");
  messages.push({ role: "assistant", content: first.content });
  messages.push({ role: "user", content: [{ type: "tool_result", tool_use_id: call.id, content: SUNNY }] });
  const last = ended(await asked.create(wanted));
  return { name: call.name, arguments: call.input, finish: first.stop_reason, text: last.text };
}

serve({ models, whole, stream, count, tools, whole_async: whole, stream_async: stream });
