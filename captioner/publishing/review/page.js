"use strict";
const $ = (id) => document.getElementById(id);
const LANGUAGE = /^[A-Za-z]{2,3}(-[A-Za-z0-9]{1,8})*$/;
let card = null, excluded = new Set(), startTime = 0, hiddenTime = 0, hiddenAt = 0, numShown = 0, canUndo = false;

/* ---------- requests to the server ---------- */

async function request(path, body) {
  const options = body === undefined ? {} : {
    method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body),
    keepalive: path === "draft",  // it arrives also when the page is closed meanwhile
  };
  let response, value;
  try {
    response = await fetch(path, options);
    value = await response.json();
  } catch (error) {
    throw new Error("captioner review does not respond; start it again and open the address that it prints");
  }
  if (!response.ok && response.status !== 409) throw new Error(value.error);
  return value;
}

async function change(path, body) {
  if ($("card").dataset.state === "saving") return;
  const before = $("card").dataset.state;
  $("card").dataset.state = "saving";
  clearTimeout(draftTimer);
  try {
    await draftSaved;
    show(await request(path, body));
  } catch (error) {
    $("card").dataset.state = before;
    const editing = before === "editing";
    $(editing ? "edit-error" : "trouble").textContent = error.message;
    if (editing) keepDraft($("editor").value);
  }
}

function decide(decision, text) {
  if (!card) return;
  const others = card.group.map((member) => member.index).filter((index) => !excluded.has(index));
  const seconds = (performance.now() - startTime - hiddenTime) / 1000;
  change("decide", {decision, text: text ?? null, shown: card.alt_text, seconds, indices: [card.index, ...others]});
}

/* ---------- rendering ---------- */

function show(state) {
  card = state.card;
  excluded = new Set();
  startTime = performance.now();
  hiddenTime = 0;
  $("trouble").textContent = "";
  showProgress(state.progress);
  $("card").hidden = !card;
  $("done").hidden = !!card;
  if (card) showCard(state.after);
  else showEnd(state.progress);
  showStatus(state.message ? `${state.message}.` : "");
  window.scrollTo(0, 0);
  (card ? $("name") : $("done-name")).focus({preventScroll: true});
  $("card").dataset.shown = ++numShown;
}

function showCard(after) {
  const {dataset} = $("card");
  dataset.imageId = card.image_id;
  dataset.index = card.index;
  stopEditing();
  $("name").textContent = card.image_id;
  $("alt-text").textContent = card.alt_text || "(empty)";
  for (const id of ["alt-text", "editor"]) $(id).lang = LANGUAGE.test(card.language ?? "") ? card.language : "";
  showCount($("count"), card.alt_text);
  showDraft();
  $("note").hidden = !card.note;
  $("note").textContent = card.note;
  $("flags").replaceChildren(...card.flags.map((flag) => element("li", flag)));
  $("flags").hidden = !card.flags.length;
  showGroup();
  showFacts();
  showImage(after);
}

function showImage(after) {
  const index = card.index, image = $("image"), link = $("enlarge");
  link.hidden = $("missing").hidden = $("in-file").hidden = true;
  image.removeAttribute("src");
  $("card").dataset.image = "loading";
  request(`about/${index}`).catch((error) => ({error: error.message, descriptions: []})).then((about) => {
    if (!card || card.index !== index) return;
    $("missing").hidden = !about.error;
    $("why").textContent = about.error;
    link.hidden = !!about.error;
    if (!about.error) link.href = image.src = `image/${index}/large`;
    $("card").dataset.image = about.error ? "missing" : "shown";
    $("in-file").hidden = !about.descriptions.length;
    $("descriptions").replaceChildren(...about.descriptions.flatMap((description) => fact(description.name, description.text)));
    if (after !== null) request(`about/${after}`).catch(() => {});  // decode the next image in advance
  });
}

function showCount(target, text) {
  const number = [...text].length;
  const over = number > card.hard_limit ? "far-over" : number > card.soft_limit ? "over" : "";
  const advice = {"": "", "over": ` – more than the recommended ${card.soft_limit}`, "far-over": ` – more than the limit of ${card.hard_limit}`};
  target.className = over;
  target.textContent = `${number} characters${advice[over]}`;
}

function showGroup() {
  const more = card.num_same - card.group.length;
  $("group").hidden = !card.group.length;
  $("neighbours").replaceChildren(...card.group.map(groupMember));
  $("group-more").textContent = more > 0 ? `${more.toLocaleString()} more have this text; they come next.` : "";
  countGroup();
}

function groupMember(member) {
  const button = element("button"), image = element("img"), mark = element("span", "✓");
  button.type = "button";
  button.dataset.index = member.index;
  button.setAttribute("aria-label", `With it: ${member.image_id}`);
  button.title = member.image_id;
  image.alt = "";
  image.src = `image/${member.index}/small`;
  mark.className = "mark";
  mark.setAttribute("aria-hidden", "true");
  button.append(image, mark);
  button.addEventListener("click", () => {
    if (!excluded.delete(member.index)) excluded.add(member.index);
    countGroup();
  });
  const item = element("li");
  item.append(button);
  return item;
}

function countGroup() {
  for (const button of $("neighbours").querySelectorAll("button"))
    button.setAttribute("aria-pressed", String(!excluded.has(Number(button.dataset.index))));
  const together = card.group.length - excluded.size;
  $("group-name").textContent = together
    ? `Decided together with ${together} ${together === 1 ? "image" : "images"} that ${together === 1 ? "has" : "have"} the same text`
    : "Decided alone; others have the same text";
  $("only").hidden = !together;
  $("all").hidden = !!together;
}

function toggleGroup() {
  if (!card || !card.group.length) return;
  const onlyThis = excluded.size < card.group.length;
  excluded = new Set(onlyThis ? card.group.map((member) => member.index) : []);
  countGroup();
  showStatus(onlyThis ? "Only this image." : "All images with this text.");
}

function showFacts() {
  const size = card.width ? `${card.width.toLocaleString()} × ${card.height.toLocaleString()} pixels` : "";
  const bytes = card.num_bytes ? (card.num_bytes < 1e6 ? `${Math.ceil(card.num_bytes / 1e3)} kB` : `${(card.num_bytes / 1e6).toFixed(1)} MB`) : "";
  const facts = [
    ["Model’s caption", normalize(card.caption) === normalize(card.alt_text) ? "" : card.caption],
    ["Mean token probability", card.certainty === null ? "unknown" : `${Math.round(100 * card.certainty)} %`],
    ["Size", [size, bytes].filter(Boolean).join(", ")],
    ["Path", card.uri],
  ];
  $("facts").replaceChildren(...facts.filter(([, text]) => text).flatMap(([name, text]) => fact(name, text)));
}

function normalize(text) {
  return text.toLowerCase().replace(/[\s.]+$/, "");
}

function showProgress(progress) {
  const reviewed = progress.total - progress.left, hours = progress.hours_left, parts = [];
  if (progress.flagged_left) parts.push(`${progress.flagged_left.toLocaleString()} flagged left`);
  if (hours !== null && progress.left)
    parts.push(hours < 1 ? `about ${Math.max(1, Math.round(hours * 60))} min left` : `about ${hours.toFixed(1)} h left`);
  const count = element("strong", `${reviewed.toLocaleString()} of ${progress.total.toLocaleString()}`);
  $("progress").replaceChildren(count, " reviewed", ...parts.map((part) => ` · ${part}`));
  $("bar").max = Math.max(1, progress.total);
  $("bar").value = reviewed;
  canUndo = progress.can_undo;
  const acceptance = progress.acceptance, percent = (share) => Math.round(100 * share);
  $("acceptance").hidden = !acceptance;
  if (acceptance) $("acceptance").textContent =
    `Accepted unchanged: ${percent(acceptance.accepted / acceptance.decided)} % of ${acceptance.decided.toLocaleString()} random images; ` +
    `in the whole table ${percent(acceptance.low)} to ${percent(acceptance.high)} % (95 % confidence)`;
}

function showEnd(progress) {
  $("card").dataset.state = "done";
  $("undo").disabled = !canUndo;
  delete $("card").dataset.imageId;
  const sentences = [progress.skipped ? `You skipped ${progress.skipped.toLocaleString()}.` : "Every image has been reviewed."];
  if (progress.left > progress.skipped) sentences.push(`Other reviewers are looking at ${(progress.left - progress.skipped).toLocaleString()}.`);
  $("done-message").textContent = sentences.join(" ");
  $("again").hidden = !progress.skipped;
  $("again").textContent = "Show the skipped ones";
}

function showStatus(message) {
  $("status").textContent = message;
  clearTimeout(showStatus.timer);
  showStatus.timer = setTimeout(() => { $("status").textContent = ""; }, 10000);
}

function fact(name, text) {
  return [element("dt", name), Object.assign(element("dd", text), {dir: "auto"})];
}

function element(tag, text) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  return node;
}

/* ---------- editing ---------- */

function startEditing() {
  if (!card || $("card").dataset.state !== "ready") return;
  $("card").dataset.state = "editing";
  $("undo").disabled = true;
  $("reading").hidden = $("actions").hidden = true;
  $("writing").hidden = false;
  const editor = $("editor");
  editor.value = card.draft ?? card.alt_text;
  $("edit-error").textContent = "";
  showCount($("edit-count"), editor.value);
  editor.focus();
  editor.setSelectionRange(editor.value.length, editor.value.length);
}

function stopEditing() {
  $("card").dataset.state = "ready";
  $("undo").disabled = !canUndo;
  $("writing").hidden = true;
  $("reading").hidden = $("actions").hidden = false;
}

function leaveEditor() {
  keepDraft($("editor").value);
  stopEditing();
  showDraft();
  $("edit").focus();
  showStatus(card.draft === null ? "Nothing was changed." : "Your text is kept as a draft.");
}

/* ---------- drafts: what was typed and is not saved yet ---------- */

let draftTimer = 0, draftSaved = Promise.resolve();

function onInput() {
  showCount($("edit-count"), $("editor").value);
  showDraftState("saving");
  clearTimeout(draftTimer);
  draftTimer = setTimeout(() => keepDraft($("editor").value), 300);
}

function draftOf(text) {
  return text.trim() && text !== card.alt_text ? text : null;
}

function keepDraft(text) {
  clearTimeout(draftTimer);
  const {index} = card, draft = draftOf(text);
  if (draft === card.draft && $("card").dataset.draft !== "failed") return showDraftState();
  card.draft = draft;
  showDraftState("saving");
  draftSaved = draftSaved.then(() => request("draft", {index, text: draft ?? ""})).then(
    () => showKept(index),
    (error) => showNotKept(index, error),
  );
}

function showKept(index) {
  if (!card || card.index !== index) return;
  const editing = $("card").dataset.state === "editing";
  if (editing && draftOf($("editor").value) !== card.draft) return;  // more was typed meanwhile
  $("trouble").textContent = "";
  showDraftState();
}

function showNotKept(index, error) {
  if (!card || card.index !== index) return;
  showDraftState("failed");
  $("trouble").textContent = `What you typed is only on this page: ${error.message}`;
}

function showDraftState(state = card.draft === null ? "none" : "kept") {
  $("card").dataset.draft = state;
  $("edit-draft").textContent = {none: "", saving: "", kept: " · kept as a draft", failed: ""}[state];
}

function showDraft() {
  $("draft").hidden = card.draft === null;
  $("draft-text").textContent = card.draft ?? "";
}

function discardDraft() {
  keepDraft("");
  showDraft();
  $("edit").focus();
  showStatus("The draft was discarded.");
}

/* ---------- keys and buttons ---------- */

const KEYS = {
  a: () => decide("approved"), Enter: () => decide("approved"), r: () => decide("rejected"), d: () => decide("decorative"),
  s: () => decide("skipped"), x: () => decide("expert"), e: startEditing, u: () => $("undo").disabled || change("undo", {}),
  o: toggleGroup, "?": openHelp,
};

function onKey(event) {
  if ($("help-page").open || event.repeat || event.isComposing) return;
  if ($("card").dataset.state === "editing") {
    if (event.key === "Escape") leaveEditor();
    else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) decide("edited", $("editor").value);
    else return;
    event.preventDefault();
    return;
  }
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const onControl = event.target.closest("button, a, input, textarea, select, summary");
  if (event.ctrlKey || event.altKey || event.metaKey || !(key in KEYS) || (key === "Enter" && onControl)) return;
  if (key !== "Enter" && !$("shortcuts").checked) return;
  event.preventDefault();
  if (key === "u" || key === "?" || card) KEYS[key]();
}

function openHelp() {
  $("help-page").showModal();
}

for (const button of document.querySelectorAll("[data-decision]"))
  button.addEventListener("click", () => decide(button.dataset.decision));
$("edit").addEventListener("click", startEditing);
$("writing").addEventListener("submit", (event) => { event.preventDefault(); decide("edited", $("editor").value); });
$("stop").addEventListener("click", leaveEditor);
$("discard").addEventListener("click", discardDraft);
$("editor").addEventListener("input", onInput);
$("undo").addEventListener("click", KEYS.u);
$("again").addEventListener("click", () => change("again", {}));
$("only").addEventListener("click", () => { toggleGroup(); $("all").focus(); });
$("all").addEventListener("click", () => { excluded = new Set(card.group.map((member) => member.index)); toggleGroup(); $("only").focus(); });
$("help").addEventListener("click", openHelp);
$("close").addEventListener("click", () => $("help-page").close());
$("shortcuts").addEventListener("change", (event) => document.body.classList.toggle("no-shortcuts", !event.target.checked));
document.addEventListener("keydown", onKey);
window.addEventListener("beforeunload", (event) => {
  if (["saving", "failed"].includes($("card").dataset.draft)) event.preventDefault();  // the browser asks whether to leave
});
document.addEventListener("visibilitychange", () => {  // time in another tab is not review time
  if (document.hidden && $("card").dataset.state === "editing") keepDraft($("editor").value);
  if (document.hidden) hiddenAt = performance.now();
  else hiddenTime += performance.now() - hiddenAt;
});
request("state").then(show).catch((error) => { $("trouble").textContent = error.message; });
