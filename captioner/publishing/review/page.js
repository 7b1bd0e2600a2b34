const LANGUAGE = /^[A-Za-z]{2,3}(-[A-Za-z0-9]{1,8})*$/;
const NAMES = {
  all: "All", undecided: "Undecided", flagged: "Flagged", approved: "Approved", edited: "Edited", rejected: "Rejected",
  decorative: "Decorative", expert: "Needs an expert", skipped: "Skipped by you", drafts: "Your drafts", failed: "Failed",
};
let card = null, excluded = new Set(), numShown = 0, canUndo = false, fromGrid = false;

/* ---------- requests to the server ---------- */

async function change(path, body) {
  if ($("card").dataset.state === "saving") return;
  const before = $("card").dataset.state;
  if (before === "editing") keepDraft($("editor").value);  // where somebody else has decided, the text stays as a draft
  $("card").dataset.state = "saving";
  try {
    await draftSaved;
    const state = await request(path, body), back = path === "decide" && fromGrid;
    if (!back) return show(state);
    stopEditing();
    await openGrid();
    showProgress(state.progress);
    showStatus(state.message ? `${state.message}.` : "");
  } catch (error) {
    $("card").dataset.state = before;
    $(before === "editing" ? "edit-error" : "trouble").textContent = error.message;
  }
}

function decide(decision, text) {
  if (!card) return;
  if (card.decided && decision === "skipped") return fromGrid ? openGrid() : loadCard();
  if (decision === "approved" && card.text !== card.alt_text) [decision, text] = ["edited", card.text];
  const others = card.group.map((member) => member.index).filter((index) => !excluded.has(index));
  change("decide", {decision, text: text ?? null, shown: card.alt_text, seconds: clock.seconds(), replaces: card.decided, indices: [card.index, ...others]});
}

function loadCard(index) {
  return request(index === undefined ? "state" : `state/${index}`).then(show).catch((error) => { $("trouble").textContent = error.message; });
}

/* ---------- rendering ---------- */

function setView(view) {
  document.body.dataset.view = view;
  for (const id of ["card", "done", "grid"]) $(id).hidden = id !== view;
  $("open-grid").disabled = view === "grid";
}

function show(state, opened = false) {
  card = state.card;
  fromGrid = opened;
  excluded = new Set();
  clock.start();
  $("trouble").textContent = "";
  showProgress(state.progress);
  setView(card ? "card" : "done");
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
  $("alt-text").textContent = card.text || "(empty)";
  for (const id of ["alt-text", "editor"]) $(id).lang = LANGUAGE.test(card.language ?? "") ? card.language : "";
  showCount($("count"), card.text);
  showDraft();
  $("skip-name").textContent = card.decided ? "Leave as it is" : "Skip";
  $("note").hidden = !card.note;
  $("note").textContent = card.note;
  $("flags").replaceChildren(...card.flags.map((flag) => element("li", flag)));
  $("flags").hidden = !card.flags.length;
  showGroup();
  showFacts();
  $("in-file").hidden = true;
  showImage(after, showDescriptions);
}

function showDescriptions({descriptions}) {
  $("in-file").hidden = !descriptions.length;
  $("descriptions").replaceChildren(...descriptions.flatMap((description) => fact(description.name, description.text)));
}

function showCount(target, text) {
  const number = [...text].length;
  const over = number > card.hard_limit ? "far-over" : number > card.soft_limit ? "over" : "";
  for (const name of ["over", "far-over"]) target.classList.toggle(name, over === name);
  const advice = {"": "", "over": ` – more than the recommended ${card.soft_limit}`, "far-over": ` – more than the limit of ${card.hard_limit}`};
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
    ["Number", `${(card.index + 1).toLocaleString()} of ${$("bar").max.toLocaleString()}`],
    ["Text before the edit", card.text === card.alt_text ? "" : card.alt_text],
    ["Model’s caption", normalize(card.caption) === normalize(card.alt_text) ? "" : card.caption],
    ["Mean token probability", card.certainty === null ? "unknown" : `${Math.round(100 * card.certainty)} %`],
    ["Lift by the judge", card.lift === null ? "" : `${card.lift.toFixed(2)} (0: fits other images as well)`],
    ["Size", [size, bytes].filter(Boolean).join(", ")],
    ["Path", card.uri],
  ];
  $("catalogue").hidden = !card.catalogue.length;
  $("columns").replaceChildren(...card.catalogue.flatMap((column) => fact(column.name, column.text)));
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
    `Approved unchanged: ${percent(acceptance.accepted / acceptance.decided)} % of ${acceptance.decided.toLocaleString()} random images; ` +
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
  request("summary").then(showSummary).catch((error) => { $("trouble").textContent = error.message; });
}

function showSummary({counts, commands}) {
  const kinds = ["approved", "edited", "decorative", "rejected", "expert", "undecided", "drafts"];
  $("counts").replaceChildren(...kinds.filter((kind) => counts[kind] || !["expert", "drafts"].includes(kind)).map((kind) => {
    const group = element("div");
    group.append(element("dt", NAMES[kind]), element("dd", counts[kind].toLocaleString()));
    return group;
  }));
  $("commands-name").hidden = !commands.length;
  $("commands").replaceChildren(...commands.map(commandItem));
}

/* ---------- editing ---------- */

function startEditing() {
  if (!card || $("card").dataset.state !== "ready") return;
  $("card").dataset.state = "editing";
  $("undo").disabled = true;
  $("reading").hidden = $("actions").hidden = true;
  $("writing").hidden = false;
  const editor = $("editor");
  editor.value = card.draft ?? card.text;
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
  return text.trim() && text !== card.text ? text : null;
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

/* ---------- the grid of all images ---------- */

const wanted = {show: "all", folder: "", query: "", page: 0};
let gridRequest = 0, queryTimer = 0, chosen = null;  // chosen: position on the page of the tile that was opened last

async function openGrid() {
  if ($("card").dataset.state === "editing") leaveEditor();
  await draftSaved;
  setView("grid");
  $("number").value = $("number-error").textContent = "";
  await loadGrid();
  const tiles = $("tiles").querySelectorAll("button");
  if (tiles.length) tiles[Math.min(chosen ?? 0, tiles.length - 1)].focus();
  else $("show").focus();
}

async function loadGrid() {
  const number = ++gridRequest;
  try {
    const grid = await request(`grid?${new URLSearchParams(wanted)}`);
    if (number === gridRequest) showGrid(grid);
  } catch (error) {
    $("trouble").textContent = error.message;
  }
}

function showGrid(grid) {
  $("trouble").textContent = "";
  wanted.page = grid.page;
  showOptions($("show"), Object.keys(NAMES).map((show) => [show, `${NAMES[show]} (${grid.counts[show].toLocaleString()})`]), wanted.show);
  const folders = Object.entries(grid.folders).map(([name, count]) => [name, `${name} (${folderCount(count)})`]);
  $("folder-field").hidden = !folders.length;
  showOptions($("folder"), [["", "All"], ...folders], wanted.folder);
  const last = grid.first + grid.images.length, range = `${(grid.first + 1).toLocaleString()}–${last.toLocaleString()} of `;
  const many = grid.num_pages > 1 ? range : "";
  const matching = grid.num_images ? `${many}${grid.num_images.toLocaleString()} ${grid.num_images === 1 ? "image" : "images"}` : "No image matches";
  const showsFailed = wanted.show === "failed", numFailed = grid.num_failed;
  const failed = numFailed && !showsFailed ? `; ${numFailed.toLocaleString()} more without a caption, under “Failed”` : grid.num_images ? "" : ".";
  $("matching").textContent = matching + failed;
  $("tiles").replaceChildren(...grid.images.map(showsFailed ? failedTile : tile));
  $("pages").hidden = grid.num_pages < 2;
  $("page-number").textContent = `Page ${(grid.page + 1).toLocaleString()} of ${grid.num_pages.toLocaleString()}`;
  $("previous").disabled = grid.page === 0;
  $("following").disabled = grid.page + 1 >= grid.num_pages;
  $("number").dataset.total = grid.total;
  $("grid").dataset.request = gridRequest;
}

function folderCount({ images, failed }) {
  return images.toLocaleString() + (failed ? `, ${failed.toLocaleString()} failed` : "");
}

function showOptions(select, options, value) {
  select.replaceChildren(...options.map(([name, text]) => Object.assign(element("option", text), {value: name})));
  select.value = value;
}

function tile(image, position) {
  const item = element("li"), button = element("button"), tags = Object.assign(element("span"), {className: "tags"});
  button.type = "button";
  tags.append(element("span", `${(image.index + 1).toLocaleString()} `));
  const good = ["approved", "edited", "decorative"].includes(image.state);
  if (image.state !== "undecided") tags.append(tag(NAMES[image.state], good ? "good" : "bad"));
  if (image.flagged) tags.append(tag("Flagged", "doubt"));
  if (image.has_draft) tags.append(tag("Draft", "doubt"));
  button.append(smallImage(`image/${image.index}/small`), tags, tileText(image.text || "(empty)", image.image_id));
  button.addEventListener("click", () => openImage(image.index, position));
  item.append(button);
  return item;
}

/* An image without a caption: why, and the image where it can be shown. There is nothing to decide about it. */
function failedTile(image) {
  const item = element("li"), tags = Object.assign(element("span"), {className: "tags"});
  item.className = "failed";
  tags.append(tag(image.reason, "bad"));
  item.append(image.has_image ? smallImage(`failed/${image.index}`) : noImage(), tags, tileText(image.text, image.image_id));
  return item;
}

function smallImage(address) {
  const small = Object.assign(element("img"), {loading: "lazy", alt: ""});
  small.addEventListener("error", () => small.replaceWith(noImage()));
  small.src = address;
  return small;
}

function noImage() {
  return Object.assign(element("span", "no image"), {className: "no-image"});
}

function tileText(words, imageId) {
  const text = Object.assign(element("span"), {className: "text"});
  text.append(Object.assign(element("span", words), {dir: "auto"}), Object.assign(element("span", imageId), {className: "id"}));
  return text;
}

function tag(text, kind) {
  return Object.assign(element("span", text), {className: `tag ${kind}`});
}

function openImage(index, position) {
  chosen = position;
  return request(`state/${index}`).then((state) => show(state, true)).catch((error) => { $("trouble").textContent = error.message; });
}

function openNumber() {
  const text = $("number").value.replace(/[\s.,]/g, ""), number = Number(text), total = Number($("number").dataset.total);
  const valid = /^\d+$/.test(text) && number >= 1 && number <= total;
  $("number-error").textContent = valid ? "" : `Give a number from 1 to ${total.toLocaleString()}.`;
  if (valid) openImage(number - 1, null);
}

function changeGrid(changes) {
  Object.assign(wanted, {page: 0}, changes);
  chosen = null;
  return loadGrid();
}

async function turnPage(step) {
  if ($(step > 0 ? "following" : "previous").disabled) return;
  await changeGrid({page: wanted.page + step});
  window.scrollTo(0, 0);
  $("tiles").querySelector("button")?.focus();
}

function moveInGrid(key) {
  const tiles = [...$("tiles").querySelectorAll("button")], position = tiles.indexOf(document.activeElement);
  const inRow = tiles.filter((one) => one.offsetTop === tiles[0].offsetTop).length;
  const step = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: inRow, ArrowUp: -inRow}[key];
  const next = key === "Home" ? 0 : key === "End" ? tiles.length - 1 : position + step;
  if (position >= 0) tiles[next]?.focus();
  return position >= 0;
}

function onGridKey(event) {
  const {key} = event, typing = event.target.closest("input, select");
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  if (key === "Escape") loadCard();
  else if (typing) return;
  else if (key === "PageDown" || key === "PageUp") turnPage(key === "PageDown" ? 1 : -1);
  else if (["ArrowRight", "ArrowLeft", "ArrowDown", "ArrowUp", "Home", "End"].includes(key)) {
    if (!moveInGrid(key)) return;
  } else if (!$("shortcuts").checked) return;
  else if (key === "/") $("query").focus();
  else if (/^[0-9]$/.test(key)) {
    $("number").focus();
    $("number").value = key;
  } else if (key === "?") openHelp();
  else if (key === "u") KEYS.u();
  else return;
  event.preventDefault();
}

/* ---------- keys and buttons ---------- */

const KEYS = {
  a: () => decide("approved"), Enter: () => decide("approved"), r: () => decide("rejected"), d: () => decide("decorative"),
  s: () => decide("skipped"), x: () => decide("expert"), e: startEditing, u: () => $("undo").disabled || change("undo", {}),
  o: toggleGroup, g: openGrid, "?": openHelp,
};

function onKey(event) {
  if ($("help-page").open || event.isComposing) return;
  if (document.body.dataset.view === "grid") return onGridKey(event);
  if (event.repeat) return;
  if ($("card").dataset.state === "editing") {
    if (event.key === "Escape") leaveEditor();
    else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) decide("edited", $("editor").value);
    else if (event.key === "Enter" && event.target === $("editor")) {  // an alt text is one line
      if (!event.shiftKey) decide("edited", $("editor").value);
    }
    else return;
    event.preventDefault();
    return;
  }
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const onControl = event.target.closest("button, a, input, textarea, select, summary");
  if (event.ctrlKey || event.altKey || event.metaKey || !(key in KEYS) || (key === "Enter" && onControl)) return;
  if (key !== "Enter" && !$("shortcuts").checked) return;
  event.preventDefault();
  if (["u", "?", "g"].includes(key) || card) KEYS[key]();
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
$("open-grid").addEventListener("click", openGrid);
$("close-grid").addEventListener("click", () => loadCard());
$("filters").addEventListener("submit", (event) => { event.preventDefault(); openNumber(); });
$("show").addEventListener("change", () => changeGrid({show: $("show").value}));
$("folder").addEventListener("change", () => changeGrid({folder: $("folder").value}));
$("query").addEventListener("input", () => {
  clearTimeout(queryTimer);
  queryTimer = setTimeout(() => changeGrid({query: $("query").value}), 200);
});
$("query").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault();  // the form's own submission is for the number
  clearTimeout(queryTimer);
  changeGrid({query: $("query").value}).then(() => $("tiles").querySelector("button")?.focus());
});
$("previous").addEventListener("click", () => turnPage(-1));
$("following").addEventListener("click", () => turnPage(1));
document.addEventListener("keydown", onKey);
window.addEventListener("beforeunload", (event) => {
  if (["saving", "failed"].includes($("card").dataset.draft)) event.preventDefault();  // the browser asks whether to leave
});
document.addEventListener("visibilitychange", () => {
  if (document.hidden && $("card").dataset.state === "editing") keepDraft($("editor").value);
});
loadCard();
