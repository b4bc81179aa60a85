// Everything from the service is put in as text, never as HTML: documents may hold anything.
const by = (id) => document.getElementById(id);
by("key").value = sessionStorage.getItem("key") ?? "";

function source({ document: name, title, score, text, ...rest }) {
  const item = document.createElement("li");
  const details = item.appendChild(document.createElement("details"));
  const place = ["page", "slide", "sheet"].filter((unit) => rest[unit] != null).map((unit) => `, ${unit} ${rest[unit]}`);
  details.appendChild(document.createElement("summary")).textContent =
    `${title ?? name} (${name}${place.join("")}, ${score.toFixed(2)})`;
  details.appendChild(document.createElement("p")).textContent = text;
  return item;
}

by("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", by("key").value);
  const body = { query: by("question").value };
  if (by("generate").checked) body.answer = "generate";
  by("note").textContent = "Asking…";
  by("answer").textContent = "";
  by("sources").replaceChildren();
  try {
    const response = await fetch("query", {
      method: "POST",
      headers: { "Content-Type": "application/json", Authorization: `Bearer ${by("key").value}` },
      body: JSON.stringify(body),
    });
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.detail);
    by("note").textContent = answer.degraded ? "The LLM did not answer; these sentences are from the documents." : "";
    by("answer").textContent = answer.response;
    by("sources").replaceChildren(...answer.sources.map(source));
  } catch (error) {
    by("note").textContent = `No answer: ${error.message}`;
  }
});
