"use strict";
const $ = (id) => document.getElementById(id);

/* ---------- what the pages of a review and a spot-check share ---------- */

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
    throw new Error(`${document.body.dataset.command} does not respond; start it again and open the address that it prints`);
  }
  if (!response.ok && response.status !== 409) throw new Error(value.error);
  return value;
}

/* The time for which an image is shown; time in another tab does not count. */
const clock = {
  started: 0, hidden: 0, hiddenAt: 0,
  start() { this.started = performance.now(); this.hidden = 0; },
  seconds() { return (performance.now() - this.started - this.hidden) / 1000; },
};
document.addEventListener("visibilitychange", () => {
  if (document.hidden) clock.hiddenAt = performance.now();
  else clock.hidden += performance.now() - clock.hiddenAt;
});

function commandItem({purpose, command}) {
  const item = element("li"), line = element("div"), copy = element("button", "Copy");
  line.className = "command";
  copy.type = "button";
  copy.setAttribute("aria-label", `Copy: ${purpose}`);
  copy.addEventListener("click", () => navigator.clipboard.writeText(command).then(
    () => showStatus("Copied."), () => showStatus("The browser did not allow it: select the text and copy it.")));
  line.append(commandLine(command), copy);
  item.append(element("p", purpose), line);
  return item;
}

/* A command line in which no flag is broken after its hyphens. */
function commandLine(command) {
  const code = element("code");
  command.split(" ").forEach((word, position) => {
    const part = word.startsWith("-") ? Object.assign(element("span", word), {className: "word"}) : word;
    code.append(position ? " " : "", part);
  });
  return code;
}

function showStatus(message) {
  $("status").textContent = message;
  clearTimeout(showStatus.timer);
  showStatus.timer = setTimeout(() => { $("status").textContent = ""; }, 10000);
}

/* Show the image of the card, or why it cannot be shown; `after`: the index of the next card. */
function showImage(after, showAbout = () => {}) {
  const index = card.index, image = $("image"), link = $("enlarge");
  link.hidden = $("missing").hidden = true;
  image.removeAttribute("src");
  $("card").dataset.image = "loading";
  request(`about/${index}`).catch((error) => ({error: error.message, descriptions: []})).then((about) => {
    if (!card || card.index !== index) return;
    $("missing").hidden = !about.error;
    $("why").textContent = about.error;
    link.hidden = !!about.error;
    if (!about.error) link.href = image.src = `image/${index}/large`;
    $("card").dataset.image = about.error ? "missing" : "shown";
    showAbout(about);
    if (after !== null) request(`about/${after}`).catch(() => {});  // decode the next image in advance
  });
}

function fact(name, text) {
  return [element("dt", name), Object.assign(element("dd", text), {dir: "auto"})];
}

function element(tag, text) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  return node;
}

function openHelp() {
  $("help-page").showModal();
}

$("help").addEventListener("click", openHelp);
$("close").addEventListener("click", () => $("help-page").close());
$("shortcuts").addEventListener("change", (event) => document.body.classList.toggle("no-shortcuts", !event.target.checked));
