// The official OpenAI library for Node, as drive.py tells it.

import { load, PLACE, serve, SUNNY, TIMEOUT, user, WEATHER } from "./drive.mjs";

const OpenAI = load("openai");
const STRICT = { ...PLACE, additionalProperties: false };
const TOOLS = [{ type: "function", function: { ...WEATHER, parameters: STRICT, strict: true } }];

// No attempt is repeated, so that a failure is seen.
const client = (url, timeout) =>
  new OpenAI({
    baseURL: `${url}/v1`,
    apiKey: "none",
    maxRetries: 0,
    timeout: timeout ? timeout * 1000 : TIMEOUT,
  });

const request = (model, text, limit) => ({
  model,
  messages: user(text),
  ...(limit ? { max_tokens: limit } : {}),
});

function ended(answer) {
  const [choice] = answer.choices;
  const tokens = answer.usage?.completion_tokens ?? null;
  return { text: choice.message.content, finish: choice.finish_reason, tokens };
}

async function models({ url }) {
  const ids = [];
  for await (const model of await client(url).models.list()) ids.push(model.id);
  return ids;
}

async function whole({ url, model, text, limit, timeout, more, signal }) {
  const wanted = { ...request(model, text, limit), ...more };
  return ended(await client(url, timeout).chat.completions.create(wanted, { signal }));
}

const USAGE = { stream: true, stream_options: { include_usage: true } };

async function stream({ url, model, text, limit, timeout, more, signal, tell }) {
  const wanted = { ...request(model, text, limit), ...USAGE, ...more };
  const seen = { text: "", finish: null, tokens: null };
  for await (const chunk of await client(url, timeout).chat.completions.create(wanted, { signal })) {
    if (chunk.usage) seen.tokens = chunk.usage.completion_tokens;
    for (const choice of chunk.choices) {
      seen.finish = choice.finish_reason ?? seen.finish;
      if (!choice.delta.content) continue;
      seen.text += choice.delta.content;
      tell(choice.delta.content);
    }
  }
  // A stream that was aborted ends for its reader like a complete one: the signal is how one knows.
  if (signal.aborted) throw new OpenAI.APIUserAbortError();
  return seen;
}

// The model asks for a tool, is told its result, and answers.
async function tools({ url, model, stream }) {
  const asked = client(url).chat.completions;
  const messages = user("How warm is it in Rome?");
  const wanted = { model, messages, tools: TOOLS };
  const first = stream ? await asked.stream(wanted).finalChatCompletion() : await asked.create(wanted);
  const [choice] = first.choices;
  const [call] = choice.message.tool_calls;
  const { role, content, tool_calls } = choice.message;
  messages.push({ role, content, tool_calls });
  messages.push({ role: "tool", tool_call_id: call.id, content: SUNNY });
  const last = ended(await asked.create(wanted));
  const { name, arguments: given } = call.function;
  return { name, arguments: given, finish: choice.finish_reason, text: last.text };
}

// The library asks for base64 and decodes it.
async function embeddings({ url, model, texts }) {
  const answer = await client(url).embeddings.create({ model, input: texts });
  return answer.data.map((row) => row.embedding);
}

async function responses({ url, model, text, limit, tell }) {
  const wanted = { model, input: text, max_output_tokens: limit, stream: true };
  let said = "";
  let last;
  for await (const event of await client(url).responses.create(wanted)) {
    last = event.response;
    if (event.type !== "response.output_text.delta") continue;
    said += event.delta;
    tell(event.delta);
  }
  return { text: said, finish: last.status, tokens: last.usage.output_tokens };
}

serve({ models, whole, stream, tools, embeddings, responses, whole_async: whole, stream_async: stream });
