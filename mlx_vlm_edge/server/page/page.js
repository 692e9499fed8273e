// The page: pictures and a question in, the answer streaming out, with where the time went.
// Nothing is fetched from anywhere but this server; conversations stay in this browser.

const $ = (id) => document.getElementById(id);
const STAGES = [
  ["Decode picture", ["image_decode_ms"]],
  ["Preprocess", ["preprocess_ms", "tokenise_ms"]],
  ["Wait", ["queue_ms"]],
  ["Vision", ["vision_ms", "connector_ms", "reduce_ms"]],
  ["Prefill", ["prefill_ms", "first_sample_ms"]],
  ["Tokens", ["decode_ms"]],
];
const SETTINGS = ["system", "max_tokens", "temperature", "top_p", "seed"];
const WELCOME = $("welcome");
$("no-script").remove();

let model = null;
let talk = begun();    // the one shown; its turns: {role, text, pictures: [data URL], timings?, usage?, failed?}
let pictures = [];     // data URLs that the next question is about
let running = null;    // AbortController of the answer under way
let live = null;       // and of the camera's questions

function begun() {
  return { id: crypto.randomUUID?.() ?? String(Date.now()), turns: [] };
}

// --- the server ----------------------------------------------------------------------------------

function headers() {
  const key = $("key").value;
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function failure(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

function content(turn) {
  if (turn.role === "assistant") return turn.text;
  const images = turn.pictures.map((url) => ({ type: "image_url", image_url: { url } }));
  return [...images, { type: "text", text: turn.text }];
}

// The turns without questions that nothing was said to, of which one may be refused; the last stays.
function sent(turns) {
  const silent = (turn) => turn?.failed && !turn.text;
  return turns.filter((turn, index) => !silent(turn) && !silent(turns[index + 1]));
}

function body(history) {
  const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));
  const system = $("system").value.trim();
  const messages = history.map((turn) => ({ role: turn.role, content: content(turn) }));
  if (system) messages.unshift({ role: "system", content: system });
  return {
    model, messages, stream: true, stream_options: { include_usage: true },
    max_tokens: number("max_tokens"), temperature: number("temperature"), top_p: number("top_p"),
    seed: number("seed"),
  };
}

// Streams the answer to a history; `show` is called with the growing answer.
async function answer(history, signal, show) {
  const response = await fetch("/v1/chat/completions", {
    method: "POST", headers: headers(), body: JSON.stringify(body(history)), signal,
  });
  if (!response.ok) throw new Error(await failure(response));
  const reply = { role: "assistant", text: "", pictures: [] };
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return reply;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      const choice = chunk.choices[0];
      if (choice?.delta.content) reply.text += choice.delta.content;
      if (choice?.finish_reason) reply.finish = choice.finish_reason;
      if (chunk.timings) reply.timings = chunk.timings;
      if (chunk.usage) reply.usage = chunk.usage;
      show(reply);
    }
  }
  throw new Error("the connection broke off");
}

// The model alone and with each adapter, where the server has some.
function choose(names) {
  const select = () => { $("model").textContent = model = $("models").value; };
  const before = model ?? recall("models");
  $("models").replaceChildren(...names.map((name) => new Option(name)));
  $("models").value = names.includes(before) ? before : names[0];
  $("models").onchange = () => { remember("models", $("models").value); select(); };
  $("choice").hidden = names.length < 2;
  select();
}

async function connect() {
  for (;;) {
    try {
      const health = await fetch("/health");
      if (health.ok) {
        const list = await fetch("/v1/models", { headers: headers() });
        if (list.status === 401) {
          $("model").textContent = "needs an API key (Settings)";
        } else {
          choose((await list.json()).data.map((entry) => entry.id));
        }
        return;
      }
      $("model").textContent = "loading the model";
    } catch {
      $("model").textContent = "the server cannot be reached";
    }
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}

// --- pictures ------------------------------------------------------------------------------------

function read(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read`));
    reader.readAsDataURL(file);
  });
}

async function add(files) {
  const drawing = (file) => file.type === "image/svg+xml";
  const images = [...files].filter((file) => file.type.startsWith("image/") && !drawing(file));
  if ([...files].some(drawing)) problem("SVG drawings cannot be read: save them as PNG.");
  else problem(files.length && !images.length ? "That is not a picture." : "");
  for (const file of images) {
    try {
      pictures.push(await read(file));
    } catch (error) {
      problem(error.message);
    }
  }
  showPictures();
}

function image(url, alt) {
  const element = document.createElement("img");
  element.src = url;
  element.alt = alt;
  return element;
}

function showPictures() {
  $("pictures").replaceChildren(...pictures.map((url, index) => {
    const item = document.createElement("li");
    const remove = button("×", () => {
      pictures.splice(index, 1);
      showPictures();
      $("pick").focus();
    });
    remove.setAttribute("aria-label", `Remove picture ${index + 1}`);
    item.append(image(url, `Picture ${index + 1}`), remove);
    return item;
  }));
}

// --- turns ---------------------------------------------------------------------------------------

function button(label, action, small = false) {
  const element = document.createElement("button");
  element.type = "button";
  element.textContent = label;
  element.addEventListener("click", action);
  if (small) element.className = "small";
  return element;
}

function paragraph(text, kind) {
  const element = document.createElement("p");
  element.className = kind;
  element.textContent = text;
  return element;
}

function userTurn(turn) {
  const element = document.createElement("article");
  element.className = "turn user";
  element.setAttribute("aria-label", "You");
  if (turn.pictures.length) {
    const shown = document.createElement("div");
    shown.className = "shown";
    shown.append(...turn.pictures.map((url, index) => image(url, `Picture ${index + 1} of the question`)));
    element.append(shown);
  }
  element.append(paragraph(turn.text, "text"));
  return element;
}

function answerTurn(turn, busy = false) {
  const element = document.createElement("article");
  element.className = `turn answer${busy ? " busy" : ""}`;
  element.setAttribute("aria-label", "Answer");
  element.append(paragraph(turn.text, "text"));
  if (turn.failed) element.append(paragraph(turn.failed, "text failed"));
  if (turn.timings) element.append(...times(turn));
  return element;
}

function milliseconds(value) {
  return value >= 1000 ? `${(value / 1000).toFixed(2)} s` : `${value.toFixed(value < 10 ? 1 : 0)} ms`;
}

// A bar whose parts are as wide as their stage took long, with its figures in words.
function times({ timings, usage, finish }) {
  const spent = STAGES.map(([name, keys]) => [name, keys.reduce((sum, key) => sum + (timings[key] ?? 0), 0)]);
  const bar = document.createElement("div");
  bar.className = "bar";
  bar.setAttribute("aria-hidden", "true");
  const legend = paragraph("", "legend");
  spent.forEach(([name, took], index) => {
    if (!took) return;
    const part = document.createElement("span");
    part.className = `stage-${index}`;
    part.style.flexGrow = took;
    bar.append(part);
    const entry = document.createElement("span");
    const mark = document.createElement("i");
    mark.className = `stage-${index}`;
    entry.append(mark, `${name} ${milliseconds(took)}`);
    legend.append(entry);
  });
  const facts = [`first token after ${milliseconds(timings.ttft_ms)}`, `${timings.decode_tokens_per_second.toFixed(1)} tokens/s`];
  if (usage) {
    const details = usage.prompt_tokens_details;
    facts.push(`${details.visual_tokens} visual tokens`, `${details.cached_tokens} of ${usage.prompt_tokens} prompt tokens known`, `${usage.completion_tokens} tokens`);
  }
  if (finish === "length") facts.push("cut at the token limit");
  return [bar, legend, paragraph(facts.join(" · "), "facts")];
}

// Whether the text is in the clipboard; pages without https have no other way than the old one.
async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch { /* the old way */ }
  const area = document.createElement("textarea");
  area.className = "unseen";
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  return done;
}

function render() {
  const shown = talk.turns.map((turn) => (turn.role === "user" ? userTurn(turn) : answerTurn(turn)));
  const last = talk.turns.at(-1);
  if (last?.role === "assistant" && !running) {
    const actions = document.createElement("div");
    actions.className = "actions";
    const copy = button("Copy", async () => {
      if (!await copied(last.text)) return problem("This browser lets no page copy: select the text.");
      copy.textContent = "Copied";
      copy.focus();
    }, true);
    actions.append(copy, button("Retry", retry, true));
    shown.at(-1).append(actions);
  }
  $("turns").replaceChildren(...(shown.length ? shown : [WELCOME]));
  $("turns").scrollTop = $("turns").scrollHeight;
}

function problem(text) {
  $("problem").textContent = text;
}

function busy(is) {
  $("stop").hidden = !is;
  $("send").hidden = is;
}

async function ask() {
  const text = $("question").value.trim();
  if (running) return;
  if (!text) return problem("Type a question first.");
  problem("");
  talk.turns.push({ role: "user", text, pictures });
  pictures = [];
  $("question").value = "";
  showPictures();
  await respond();
  $("question").focus();
}

// The answer belongs to the conversation that was asked, whichever is shown when it is over.
async function respond() {
  const asked = talk;
  const mine = running = new AbortController();
  stopLoop();
  busy(true);
  render();
  let element = answerTurn({ text: "" }, true);
  $("turns").append(element);
  let reply = { role: "assistant", text: "", pictures: [] };
  const near = () => $("turns").scrollHeight - $("turns").scrollTop - $("turns").clientHeight < 80;
  try {
    reply = await answer(sent(asked.turns), mine.signal, (growing) => {
      const follow = near();
      reply = growing;
      element.firstChild.textContent = growing.text;
      if (follow) $("turns").scrollTop = $("turns").scrollHeight;
    });
  } catch (error) {
    if (error.name !== "AbortError") reply.failed = error.message;
    else reply.failed = reply.text ? "Stopped." : "Stopped before the first word.";
  }
  asked.turns.push(reply);
  await keep(asked);
  if (running === mine) idle();
  if (asked === talk) render();
}

function idle() {
  running = null;
  busy(false);
}

function retry() {
  talk.turns.pop();
  respond();
}

// Shows another conversation; what is being said in the one that is left ends there.
function turnTo(other) {
  running?.abort();
  idle();
  talk = other;
  render();
}

// --- camera --------------------------------------------------------------------------------------

async function openCamera() {
  if (!navigator.mediaDevices?.getUserMedia) return problem("This browser gives no camera to pages without https.");
  try {
    $("camera").srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    await $("camera").play();
    $("live").hidden = false;
    problem("");
  } catch {
    problem("The camera cannot be used.");
  }
}

function closeCamera() {
  stopLoop();
  $("camera").srcObject?.getTracks().forEach((track) => track.stop());
  $("camera").srcObject = null;
  $("live").hidden = true;
}

function frame() {
  const video = $("camera");
  const canvas = document.createElement("canvas");
  canvas.width = video.videoWidth;
  canvas.height = video.videoHeight;
  canvas.getContext("2d").drawImage(video, 0, 0);
  return canvas.toDataURL("image/jpeg", 0.92);
}

function stopLoop() {
  live?.abort();
  live = null;
  $("loop").setAttribute("aria-pressed", "false");
  $("loop").textContent = "Ask again and again";
}

// The same question about one frame after the other, with how many answers a second there are.
async function loop() {
  if (live) return stopLoop();
  if (running) return problem("An answer is under way: stop it, or wait for its end.");
  problem("");
  const text = $("question").value.trim() || "Describe the image.";
  const mine = live = new AbortController();
  $("loop").setAttribute("aria-pressed", "true");
  $("loop").textContent = "Stop asking";
  let smoothed = 0;
  while (live === mine) {
    const started = performance.now();
    try {
      const reply = await answer([{ role: "user", text, pictures: [frame()] }], mine.signal, (growing) => {
        if (growing.text) $("live-answer").textContent = growing.text;
      });
      const rate = 1000 / (performance.now() - started);
      smoothed = smoothed ? 0.7 * smoothed + 0.3 * rate : rate;
      const first = reply.timings ? `, first token after ${milliseconds(reply.timings.ttft_ms)}` : "";
      $("fps").textContent = `${smoothed.toFixed(1)} frames/s${first}`;
    } catch (error) {
      if (error.name !== "AbortError") problem(error.message);
      break;
    }
  }
  if (live === mine) stopLoop();
}

// --- what this browser keeps, where it lets a page keep something --------------------------------

function recall(name) {
  try {
    return localStorage.getItem(name);
  } catch {
    return null;
  }
}

function remember(name, value) {
  try {
    localStorage.setItem(name, value);
  } catch { /* asked for anew the next time */ }
}

function store(mode) {
  return new Promise((resolve, reject) => {
    const opening = indexedDB.open("mlx-vlm-edge", 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore("conversations", { keyPath: "id" });
    opening.onerror = () => reject(opening.error);
    opening.onsuccess = () => resolve(opening.result.transaction("conversations", mode).objectStore("conversations"));
  });
}

function done(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

async function keep({ id, turns }) {
  try {
    await done((await store("readwrite")).put({ id, when: Date.now(), turns }));
  } catch {
    problem("This browser keeps no history.");
  }
}

async function showHistory() {
  let past = [];
  try {
    past = await done((await store("readonly")).getAll());
  } catch { /* a private window: nothing is kept */ }
  past.sort((one, other) => other.when - one.when);
  $("past").replaceChildren(...past.map((entry) => {
    const item = document.createElement("li");
    item.append(button(`${new Date(entry.when).toLocaleString()}: ${entry.turns[0].text}`, () => {
      if (entry.id !== talk.id) turnTo({ id: entry.id, turns: entry.turns });
      $("history").close();
    }));
    return item;
  }));
  $("history").showModal();
}

function startNew() {
  turnTo(begun());
  pictures = [];
  problem("");
  showPictures();
  $("question").focus();
}

// --- what is pressed, dropped and pasted -----------------------------------------------------------

// Whether a key is an input method's; of the one that ends a composition Safari tells the code alone.
function composing(event) {
  return event.isComposing || event.keyCode === 229;
}

$("ask").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !composing(event)) { event.preventDefault(); ask(); }
});
$("stop").addEventListener("click", () => running?.abort());
$("pick").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", async () => { await add($("file").files); $("file").value = ""; });
$("camera-open").addEventListener("click", openCamera);
$("camera-close").addEventListener("click", closeCamera);
$("shoot").addEventListener("click", () => { pictures.push(frame()); showPictures(); });
$("loop").addEventListener("click", loop);
$("new").addEventListener("click", startNew);
$("settings-open").addEventListener("click", () => $("settings").showModal());
$("settings").addEventListener("close", () => {
  for (const id of SETTINGS) remember(id, $(id).value);
  connect();
});
$("history-open").addEventListener("click", showHistory);
$("forget").addEventListener("click", async () => {
  try {
    await done((await store("readwrite")).clear());
  } catch { /* nothing was kept */ }
  $("past").replaceChildren();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || composing(event) || document.querySelector("dialog[open]")) return;
  running?.abort();
  stopLoop();
});
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) { event.preventDefault(); add(event.clipboardData.files); }
});
document.addEventListener("dragover", (event) => { event.preventDefault(); $("drop").hidden = false; });
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("drop").hidden = true; });
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").hidden = true;
  add(event.dataTransfer.files);
});

for (const id of SETTINGS) {
  const value = recall(id);
  if (value !== null) $(id).value = value;
}
connect();
