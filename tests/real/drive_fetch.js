// What a page does with fetch() alone, as drive.py tells it: the test calls obey(), and say() is its ear.
// It reads a stream as most pages do: an error inside it is not looked for, only its end.

class HttpError extends Error {
  constructor(status, body) {
    super(body.error?.message ?? JSON.stringify(body));
    this.status_code = status;
    this.code = body.error?.code;
  }
}

const told = (error) => {
  const { name, message, status_code, code } = error;
  const kind = error.constructor.name;
  return { kind, kinds: [kind, name], text: message, status_code, code };
};

const controls = new Map();

async function post(url, body, signal) {
  const headers = { "Content-Type": "application/json" };
  const answer = await fetch(url, { method: "POST", headers, body: JSON.stringify(body), signal });
  if (!answer.ok) throw new HttpError(answer.status, await answer.json());
  return answer;
}

const request = (model, text, limit) => ({
  model,
  messages: [{ role: "user", content: text }],
  ...(limit ? { max_tokens: limit } : {}),
});

async function models({ url }) {
  const answer = await (await fetch(`${url}/v1/models`)).json();
  return answer.data.map((model) => model.id);
}

async function whole({ url, model, text, limit, signal }) {
  const answer = await post(`${url}/v1/chat/completions`, request(model, text, limit), signal);
  const { choices, usage } = await answer.json();
  return { text: choices[0].message.content, finish: choices[0].finish_reason, tokens: usage.completion_tokens };
}

async function* eventsOf(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (let { value, done } = await reader.read(); !done; { value, done } = await reader.read()) {
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.split("\n").filter((line) => line.startsWith("data:"));
      if (data.length && data[0] !== "data: [DONE]") yield JSON.parse(data[0].slice(5));
    }
  }
}

async function stream({ url, model, text, limit, signal, tell }) {
  const wanted = { ...request(model, text, limit), stream: true, stream_options: { include_usage: true } };
  const seen = { text: "", finish: null, tokens: null };
  for await (const chunk of eventsOf(await post(`${url}/v1/chat/completions`, wanted, signal))) {
    if (chunk.usage) seen.tokens = chunk.usage.completion_tokens;
    for (const choice of chunk.choices ?? []) {
      seen.finish = choice.finish_reason ?? seen.finish;
      if (!choice.delta.content) continue;
      seen.text += choice.delta.content;
      tell(choice.delta.content);
    }
  }
  return seen;
}

async function embeddings({ url, model, texts }) {
  const answer = await (await post(`${url}/v1/embeddings`, { model, input: texts })).json();
  return answer.data.map((row) => row.embedding);
}

async function headers({ url, model, text }) {
  const answer = await post(`${url}/v1/chat/completions`, request(model, text));
  await answer.json();
  return Object.fromEntries(answer.headers);
}

const jobs = { models, whole, stream, embeddings, headers, whole_async: whole, stream_async: stream };

function obey({ id, job, cancel, ...wanted }) {
  if (cancel) {
    controls.get(cancel).abort();
    return;
  }
  const control = new AbortController();
  controls.set(id, control);
  const tell = (piece) => say(JSON.stringify({ id, piece }));
  jobs[job]({ ...wanted, tell, signal: control.signal }).then(
    (done) => say(JSON.stringify({ id, done })),
    (error) => say(JSON.stringify({ id, raised: told(error) })),
  );
}
