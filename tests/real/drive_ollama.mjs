// The official Ollama library for Node, as drive.py tells it.

import { load, serve, SUNNY, user, WEATHER } from "./drive.mjs";

const { Ollama } = load("ollama");
const TOOLS = [{ type: "function", function: WEATHER }];

const request = (model, text, limit) => ({
  model,
  messages: user(text),
  ...(limit ? { options: { num_predict: limit } } : {}),
});

const ended = (last, text) => ({
  text,
  finish: last.done ? last.done_reason : null,
  tokens: last.eval_count ?? null,
});

async function models({ url }) {
  return (await new Ollama({ host: url }).list()).models.map((model) => model.name);
}

// Before a stream's head is there, and for a whole answer, the library has no way to cancel but the fetch
// that one gives it.
const client = (url, signal) =>
  new Ollama({
    host: url,
    fetch: (to, how) => fetch(to, { ...how, signal: AbortSignal.any([signal, how.signal ?? signal]) }),
  });

async function whole({ url, model, text, limit, signal }) {
  const there = client(url, signal);
  const answer = await there.chat(request(model, text, limit));
  return ended(answer, answer.message.content);
}

async function stream({ url, model, text, limit, signal, tell }) {
  const early = new AbortController();
  const there = client(url, early.signal);
  const abortEarly = () => early.abort();
  signal.addEventListener("abort", abortEarly);
  const parts = await there.chat({ ...request(model, text, limit), stream: true });
  signal.removeEventListener("abort", abortEarly);
  signal.addEventListener("abort", () => there.abort());
  let said = "";
  let last = {};
  for await (const part of parts) {
    last = part;
    if (!part.message.content) continue;
    said += part.message.content;
    tell(part.message.content);
  }
  return ended(last, said);
}

async function generate({ url, model, text, limit, tell }) {
  const wanted = { model, prompt: text, options: { num_predict: limit }, stream: true };
  let said = "";
  let last = {};
  for await (const part of await new Ollama({ host: url }).generate(wanted)) {
    last = part;
    if (!part.response) continue;
    said += part.response;
    tell(part.response);
  }
  return ended(last, said);
}

// The model asks for a tool, is told its result, and answers.
async function tools({ url, model, stream }) {
  const there = new Ollama({ host: url });
  const messages = user("How warm is it in Rome?");
  const parts = [];
  if (stream) {
    for await (const part of await there.chat({ model, messages, tools: TOOLS, stream })) parts.push(part);
  } else {
    parts.push(await there.chat({ model, messages, tools: TOOLS }));
  }
  const [call] = parts.flatMap((part) => part.message.tool_calls ?? []);
  messages.push({ role: "assistant", content: "", tool_calls: [call] });
  messages.push({ role: "tool", tool_name: call.function.name, content: SUNNY });
  const last = await there.chat({ model, messages, tools: TOOLS });
  const { name, arguments: given } = call.function;
  return { name, arguments: given, finish: parts.at(-1).done_reason, text: last.message.content };
}

async function embeddings({ url, model, texts }) {
  return (await new Ollama({ host: url }).embed({ model, input: texts })).embeddings;
}

serve({ models, whole, stream, generate, tools, embeddings, whole_async: whole, stream_async: stream });
