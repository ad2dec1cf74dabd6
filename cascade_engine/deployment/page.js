"use strict";
// Sends the dropped video as the request's body and shows the answer; text only ever becomes text, never markup.
const part = (id) => document.getElementById(id);
const drop = part("drop");

const line = (name, score) => {
  const row = document.createElement("li");
  const bar = document.createElement("meter");
  const number = document.createElement("output");
  const label = document.createElement("span");
  bar.value = score;
  label.textContent = name;
  number.textContent = score.toFixed(3);
  row.append(label, bar, number);
  return row;
};

const say = (text, failed = false) => {
  part("status").textContent = text;
  part("status").classList.toggle("failed", failed);
};

const show = (found) => {
  part("label").textContent = found.label;
  part("top").replaceChildren(...found.top.map((each) => line(each.label, each.score)));
  part("timeline").replaceChildren(
    ...found.timeline.map((each) => line(`${each.start.toFixed(1)}–${each.end.toFixed(1)} s  ${each.label}`, each.score)));
  part("result").hidden = false;
  say(found.problem ?? "", Boolean(found.problem));
};

const classify = async (file) => {
  part("result").hidden = true;
  say(`Looking at ${file.name} ...`);
  try {
    const answer = await fetch("classify?top=5&timeline=true",
      { method: "POST", headers: { "Content-Type": "application/octet-stream" }, body: file });
    const found = await answer.json();
    if (answer.ok) show(found);
    else say(typeof found.detail === "string" ? found.detail : `refused (${answer.status})`, true);
  } catch (error) {
    say(`The service cannot be reached (${error.message}).`, true);
  }
};

part("file").addEventListener("change", (event) => {
  if (event.target.files.length) classify(event.target.files[0]);
  event.target.value = "";
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  drop.addEventListener(kind, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files.length) classify(event.dataTransfer.files[0]);
  });
}
fetch("model").then((answer) => answer.json()).then((model) => {
  part("model").textContent = `${model.labels.length} labels from ${model.views.map((view) => view.name).join(" and ")}`;
});
