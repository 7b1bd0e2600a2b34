let card = null, numShown = 0, canUndo = false;

async function change(path, body) {
  if ($("card").dataset.state === "saving") return;
  const before = $("card").dataset.state;
  $("card").dataset.state = "saving";
  try {
    show(await request(path, body));
  } catch (error) {
    $("card").dataset.state = before;
    $("trouble").textContent = error.message;
  }
}

function judge(verdict) {
  if (card) change("decide", {verdict, index: card.index, shown: card.text, seconds: clock.seconds()});
}

/* ---------- rendering ---------- */

function show(state) {
  card = state.card;
  clock.start();
  $("trouble").textContent = "";
  showProgress(state.progress);
  document.body.dataset.view = card ? "card" : "done";
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
  dataset.state = "ready";
  $("name").textContent = card.image_id;
  $("alt-text").textContent = card.text || "(empty)";
  showImage(after);
}

function showProgress(progress) {
  const minutes = progress.minutes_left, left = progress.total - progress.judged - progress.skipped;
  const time = minutes === null || !left ? "" : ` · about ${Math.max(1, Math.round(minutes)).toLocaleString()} min left`;
  const count = element("strong", `${progress.judged.toLocaleString()} of ${progress.total.toLocaleString()}`);
  $("progress").replaceChildren(count, " judged", time);
  $("bar").max = progress.total;
  $("bar").value = progress.judged;
  canUndo = progress.can_undo;
  $("undo").disabled = !canUndo;
}

function showEnd(progress) {
  $("card").dataset.state = "done";
  delete $("card").dataset.imageId;
  $("done-message").textContent = progress.skipped ? `You skipped ${progress.skipped.toLocaleString()}.` : "You have judged every caption of the sample.";
  $("again").hidden = !progress.skipped;
  request("summary").then(({lines, commands}) => {
    $("lines").replaceChildren(...lines.map((line) => element("li", line)));
    $("commands").replaceChildren(...commands.map(commandItem));
  }).catch((error) => { $("trouble").textContent = error.message; });
}

/* ---------- keys and buttons ---------- */

const KEYS = {
  "1": "right", r: "right", Enter: "right", "2": "small_fault", f: "small_fault", "3": "wrong", w: "wrong",
  "4": "offensive", o: "offensive", s: "skipped",
};

function undo() {
  if (canUndo) change("undo", {});
}

function onKey(event) {
  if ($("help-page").open || event.isComposing || event.repeat) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (event.ctrlKey || event.altKey || event.metaKey || (key === "Enter" && event.target.closest("button, a, input"))) return;
  if (key !== "Enter" && !$("shortcuts").checked) return;
  if (key === "u") undo();
  else if (key === "?") openHelp();
  else if (card && key in KEYS) judge(KEYS[key]);
  else return;
  event.preventDefault();
}

for (const button of document.querySelectorAll("[data-verdict]"))
  button.addEventListener("click", () => judge(button.dataset.verdict));
$("undo").addEventListener("click", undo);
$("again").addEventListener("click", () => change("again", {}));
document.addEventListener("keydown", onKey);
request("state").then(show).catch((error) => { $("trouble").textContent = error.message; });
