// Asks the server what its models take, sends it what is filled in, and shows what comes back.
"use strict";

const id = name => document.getElementById(name);
const form = id("ask"), shelf = id("shelf"), stop = id("stop"), problem = id("problem"), drop = id("drop");
let models = [];  // as /v1/models tells of them
let pictures = [];  // files that go with the prompt
const brushes = new WeakMap();  // what is painted over them, by file
const PAINT = "#0f766e";
let underWay = null;  // what ends the drawing at hand
let links = [];  // of what is shown, to be given back

// ---- the form

const chosen = () => models.find(each => each.id === form.model.value);
const named = name => [...form.elements].find(each => (each.name || each.id) === name && !each.disabled);

async function learn() {
  try {
    models = (await (await ask("/v1/models")).json()).data;
  } catch (error) {
    tell(error);
    return;
  }
  forgive();
  form.model.replaceChildren(...models.map(each => new Option(`${each.id} (${each.details.sparsity})`, each.id)));
  choose();
}

function choose() {
  const {takes, defaults} = chosen().details;
  for (const part of form.querySelectorAll("[data-if], [data-unless]")) {
    part.hidden = part.dataset.if ? !takes[part.dataset.if] : Boolean(takes[part.dataset.unless]);
    for (const field of part.querySelectorAll("input, select, textarea")) field.disabled = part.hidden;
  }
  for (const name of ["num_inference_steps", "guidance_scale", "guidance_scale_2", "num_frames"])
    form.elements[name].placeholder = defaults[name] ?? "";
  form.guidance_scale_2.placeholder ||= defaults.guidance_scale;
  form.num_frames.step = takes.frame_step ?? 1;
  form.size.placeholder = `${defaults.width}x${defaults.height}`;
  form.size.title = `WIDTHxHEIGHT, multiples of ${takes.size_step}`;
  refill(id("class"), takes.classes ?? []);
  refill(form.output_format, takes.formats);
  id("beside").hidden = alike().length < 2;
  if (takes.pictures) askForPictures(takes);
}

function askForPictures({pictures: {most}, frame_step: film, changes}) {
  const edited = most > 1 ? `up to ${most} pictures to edit` : `picture to ${changes ? "change" : "edit"}`;
  const begins = "picture that the film begins with" + (most > 1 ? ", and one that it ends with" : "");
  const what = film ? begins : edited;
  const paint = changes ? "; paint over what is to be drawn anew, or nothing" : "";
  id("pictures-are").textContent = `${what}: choose, or drop here${paint}`;
  form.image.multiple = most > 1;
  pictures = pictures.slice(0, most);
  showThumbnails();
}

function refill(select, values) {
  const before = select.value;
  select.replaceChildren(...values.map(each => new Option(each, each.split(", ")[0])));
  pick(select, before);
  if (select.selectedIndex < 0) select.selectedIndex = 0;
}

// Of several names of a class any one is good; of none that is known, nothing is chosen.
function pick(select, name) {
  const named = each => each.value === name || each.text.split(", ").includes(name);
  select.selectedIndex = [...select.options].findIndex(named);
}

// Models that take the same as the chosen one, itself among them.
function alike() {
  const same = JSON.stringify(chosen().details.takes);
  return models.filter(each => JSON.stringify(each.details.takes) === same);
}

function add(files) {
  const {most, bytes} = chosen().details.takes.pictures;
  forgive();
  const all = most === 1 ? files.slice(-1) : [...pictures, ...files];
  pictures = all.slice(0, most);
  if (all.length > most) blame("image", `${all.length} pictures; at most ${most} are taken`);
  const size = pictures.reduce((sum, each) => sum + each.size, 0);
  if (size > bytes) blame("image", `the pictures have ${mebibytes(size)} MiB; at most ${mebibytes(bytes)} are taken`);
  showThumbnails();
}

const mebibytes = bytes => (bytes / 2 ** 20).toFixed(1);

function showThumbnails() {
  id("thumbnails").replaceChildren(...pictures.map((file, index) => {
    const item = document.createElement("li"), picture = new Image();
    picture.src = URL.createObjectURL(file);
    picture.onload = () => URL.revokeObjectURL(picture.src);
    picture.alt = `${index + 1}: ${file.name}`;
    const remove = button("remove", () => {
      pictures.splice(index, 1);
      forgive();
      showThumbnails();
      form.image.focus();
    });
    remove.setAttribute("aria-label", `remove ${file.name}`);
    remove.className = "quiet";
    item.append(...(chosen().details.takes.changes ? brush(file, picture) : [picture]), remove);
    return item;
  }));
}

// The picture under a canvas that is painted on, at most 512 pixels a side, and what takes the paint away.
function brush(file, picture) {
  const place = document.createElement("div"), canvas = brushes.get(file) ?? document.createElement("canvas");
  const context = canvas.getContext("2d");
  const clear = button("change all of it", () => {
    context.clearRect(0, 0, canvas.width, canvas.height);
    delete canvas.dataset.painted;
    clear.hidden = true;
  });
  clear.hidden = !canvas.dataset.painted;
  clear.className = "quiet";
  place.className = "brush";
  place.append(picture, canvas);
  if (brushes.has(file)) return [place, clear];
  brushes.set(file, canvas);
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", "what is painted is drawn anew");
  picture.addEventListener("load", () => {
    const scale = Math.min(1, 512 / Math.max(picture.naturalWidth, picture.naturalHeight));
    canvas.width = Math.max(1, picture.naturalWidth * scale);
    canvas.height = Math.max(1, picture.naturalHeight * scale);
  });
  const stroke = event => {
    if (!event.buttons) return;
    const box = canvas.getBoundingClientRect(), scale = canvas.width / box.width;
    const point = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
    context.lineTo(...point);
    context.lineTo(...point);  // of one alone there is nothing to see
    Object.assign(context, {lineCap: "round", lineWidth: Math.max(canvas.width, canvas.height) / 8, strokeStyle: PAINT});
    context.stroke();
    canvas.dataset.painted = "yes";
    canvas.closest("li").querySelector("button").hidden = false;
  };
  for (const kind of ["pointerenter", "pointerdown"]) canvas.addEventListener(kind, () => context.beginPath());
  for (const kind of ["pointerdown", "pointermove"]) canvas.addEventListener(kind, stroke);
  return [place, clear];
}

// What is painted over a picture, white on black, as a file; null where nothing is.
function painted(file) {
  const canvas = chosen().details.takes.changes ? brushes.get(file) : null;
  if (!canvas?.dataset.painted) return null;
  const mask = document.createElement("canvas"), context = mask.getContext("2d");
  Object.assign(mask, {width: canvas.width, height: canvas.height});
  context.drawImage(canvas, 0, 0);
  for (const [how, colour] of [["source-in", "#fff"], ["destination-over", "#000"]]) {
    Object.assign(context, {globalCompositeOperation: how, fillStyle: colour});
    context.fillRect(0, 0, mask.width, mask.height);
  }
  return new Promise(done => mask.toBlob(done, "image/png"));
}

function button(text, deed) {
  const made = document.createElement("button");
  Object.assign(made, {type: "button", textContent: text, onclick: deed});
  return made;
}

// ---- what went wrong

// An error of the server, in OpenAI's shape: a sentence, and the field that it is about.
function refusal(error) {
  return Object.assign(new Error(error.message), {field: error.code === "invalid_api_key" ? "key" : error.param});
}

async function failure(answer) {
  try {
    return refusal((await answer.json()).error);
  } catch {  // not this server's, but of a proxy in front of it
    const after = answer.headers.get("retry-after");
    return new Error(`the server answered ${answer.status}` + (after ? `; try again in ${after} s` : ""));
  }
}

// For what fails without an answer; what was stopped is told apart.
const orSay = text => error => { throw new Error(error.name === "AbortError" ? "stopped" : text); };

// Says it beside the field; false where there is none of that name.
function blame(name, text) {
  if (name === "key") id("locked").hidden = false;
  const field = name && named(name);
  if (!field) return false;
  const place = field.closest("label");
  place.querySelector(".bad")?.remove();
  const said = document.createElement("span");
  Object.assign(said, {className: "bad", textContent: text, role: "alert"});
  place.append(said);
  field.setAttribute("aria-invalid", "true");
  field.closest("details")?.setAttribute("open", "");
  field.focus();
  return true;
}

function tell(error) {
  if (blame(error.field, error.message)) return;
  problem.textContent = error.message;
  problem.hidden = false;
}

function forgive() {
  problem.hidden = true;
  form.querySelectorAll("label .bad").forEach(each => each.remove());
  form.querySelectorAll("[aria-invalid]").forEach(each => each.removeAttribute("aria-invalid"));
}

// ---- one request

function request(model, seed) {
  const asked = {stream: true, progress: true, partial_images: 3};
  for (const [name, value] of new FormData(form)) {
    if (typeof value === "string" && value) asked[name] = named(name).type === "number" ? Number(value) : value;
  }
  return {...asked, model, seed};
}

async function ask(path, {headers, ...more} = {}) {
  const key = form.key.value ? {authorization: "Bearer " + form.key.value} : {};
  const asked = fetch(path, {...more, headers: {...headers, ...key}});
  const answer = await asked.catch(orSay("the server cannot be reached"));
  if (!answer.ok) throw await failure(answer);
  return answer;
}

async function send(asked, signal) {
  const {takes} = chosen().details, told = takes.pictures ? pictures : [];
  const control = takes.control ? form.control.files[0] : null;
  if (!told.length && !control) {
    const headers = {"content-type": "application/json"};
    return ask("/v1/images/generations", {method: "POST", headers, body: JSON.stringify(asked), signal});
  }
  const body = new FormData();
  for (const [name, value] of Object.entries(asked)) body.append(name, value);
  for (const picture of told) body.append("image", picture);
  if (control) body.append("control", control);
  const mask = told.length ? await painted(told[0]) : null;
  if (mask) body.append("mask", mask, "mask.png");
  return ask("/v1/images/edits", {method: "POST", body, signal});
}

const BROKEN = "the server broke off";

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const {value, done} = await reader.read().catch(orSay(BROKEN));
    if (done) throw new Error(BROKEN);  // without its last event
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const event = JSON.parse(part.slice(part.indexOf("data: ") + 6));
      if (event.error) throw refusal(event.error);
      yield event;
      if (event.type === "obsdiff.finished") return;
    }
  }
}

async function draw(model, seed, signal) {
  const asked = request(model.id, seed);
  const frames = Array.from({length: asked.n ?? 1}, (_, image) => frame(model, image, asked.prompt));
  try {
    const answer = await send(asked, signal);
    for await (const event of events(answer.body)) {
      const shown = frames[event.image_index];
      if (event.type === "obsdiff.progress") frames.forEach(each => each.step(event));
      else if (event.type === "obsdiff.finished") frames.forEach(each => each.done(event.metrics));
      else shown.show(event, event.type.endsWith(".completed"));
    }
  } catch (error) {
    const blamed = blame(error.field, error.message);
    frames.forEach(each => each.fail(blamed ? "" : error.message));
  }
}

// ---- what is shown

// A place for a picture on the shelf, or for what became of it.
function frame(model, image, prompt) {
  const figure = document.createElement("figure"), caption = document.createElement("figcaption");
  const picture = new Image(), name = document.createElement("b"), words = document.createElement("span");
  const bar = document.createElement("progress"), deeds = document.createElement("div");
  picture.alt = "";
  name.textContent = model.id;
  words.textContent = "waiting";
  bar.value = 0;
  deeds.className = "deeds";
  bar.setAttribute("aria-label", "steps");
  caption.append(name, words, bar, deeds);
  figure.append(picture, caption);
  shelf.append(figure);
  let finished = null;  // the last event's picture
  return {
    show(data, last) {
      picture.onload = () => figure.classList.toggle("coarse", picture.naturalWidth < 256);
      picture.src = link(data);
      if (!last) return;
      finished = data;
      picture.alt = prompt;
      bar.remove();
      figure.dataset.done = "yes";
    },
    step(data) {
      bar.max = data.steps;
      bar.value = data.step;
      words.textContent = `step ${data.step} of ${data.steps}`;
    },
    done(metrics) {
      const took = metrics.stage_seconds, seconds = Object.values(took).reduce((sum, each) => sum + each, 0);
      words.textContent = `seed ${metrics.seed}, image ${image + 1}; ${metrics.num_inference_steps} steps, ` +
        `${seconds.toFixed(2)} s (waited ${(took.queue || 0).toFixed(2)})`;
      const save = document.createElement("a");
      save.href = picture.src;
      save.download = `${model.id}-${metrics.seed}-${image + 1}.${finished.output_format}`;
      save.textContent = "download";
      deeds.append(save, button("use this seed", () => { form.seed.value = metrics.seed; form.seed.focus(); }));
      if (model.details.takes.frame_step) deeds.append(player(picture));
    },
    fail(text) {
      if (finished) return;
      if (!text) { figure.remove(); return; }
      words.textContent = text;
      words.className = "bad";
      words.role = "alert";
      bar.remove();
      if (!picture.src) picture.remove();
    },
  };
}

function link(data) {
  const bytes = Uint8Array.from(atob(data.b64_json), each => each.charCodeAt(0));
  links.push(URL.createObjectURL(new Blob([bytes], {type: `image/${data.output_format}`})));
  return links.at(-1);
}

// A film is an image that moves, and that no browser can stop: instead of it a button shows its first frame.
function player(picture) {
  const film = picture.src;
  const made = button("pause", () => {
    const moves = picture.src === film;
    picture.src = moves ? firstFrame(picture) : film;
    made.textContent = moves ? "play" : "pause";
  });
  if (matchMedia("(prefers-reduced-motion: reduce)").matches) picture.decode().then(() => made.click());
  return made;
}

function firstFrame(picture) {
  const canvas = document.createElement("canvas");
  canvas.width = picture.naturalWidth;
  canvas.height = picture.naturalHeight;
  canvas.getContext("2d").drawImage(picture, 0, 0);
  return canvas.toDataURL();
}

// ---- what a person does

form.addEventListener("submit", async event => {
  event.preventDefault();
  if (underWay || !models.length) return;
  forgive();
  const {pictures: taken} = chosen().details.takes;
  if (taken && pictures.length < taken.least) {
    const few = `this model draws nothing without ${taken.least} pictures; ${pictures.length} chosen`;
    blame("image", taken.least > 1 ? few : "this model draws nothing without a picture; choose one");
    return;
  }
  underWay = new AbortController();
  stop.disabled = false;
  shelf.replaceChildren();
  links.splice(0).forEach(each => URL.revokeObjectURL(each));
  id("news").textContent = "drawing";
  const seed = form.seed.value ? Number(form.seed.value) : Math.floor(Math.random() * 2 ** 32);
  const wanted = form.all.checked ? alike() : [chosen()];
  await Promise.all(wanted.map(model => draw(model, seed, underWay.signal)));
  id("news").textContent = `${shelf.querySelectorAll("[data-done]").length} drawn`;
  if (document.activeElement === stop) id("draw").focus();
  underWay = null;
  stop.disabled = true;
});
// What a browser refuses by itself it points at, but not inside of what is closed.
form.addEventListener("invalid", event => {
  const closed = event.target.closest("details:not([open])");
  if (!closed) return;
  closed.open = true;
  setTimeout(() => event.target.reportValidity());
}, true);
form.addEventListener("keydown", event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
stop.addEventListener("click", () => underWay?.abort());
form.model.addEventListener("change", choose);
form.key.addEventListener("change", learn);
form.image.addEventListener("change", () => { add([...form.image.files]); form.image.value = ""; });
for (const kind of ["dragover", "drop"]) addEventListener(kind, event => event.preventDefault());  // or it is opened
for (const kind of ["dragover", "dragleave", "drop"]) drop.addEventListener(kind, event => {
  drop.classList.toggle("over", kind === "dragover");
  if (kind === "drop") add([...event.dataTransfer.files]);
});

learn().then(() => {
  const given = new URLSearchParams(location.search);  // ?prompt=...&seed=1&all=1 draws at once
  if (models.some(each => each.id === given.get("model"))) { form.model.value = given.get("model"); choose(); }
  for (const [name, value] of given) {
    const field = named(name);
    if (!field || ["key", "image", "control", "model"].includes(name)) continue;
    if (field.type === "checkbox") field.checked = true;
    else if (field.tagName === "SELECT") pick(field, value);
    else field.value = value;
  }
  if (given.has("prompt") && models.length) form.requestSubmit();
});
