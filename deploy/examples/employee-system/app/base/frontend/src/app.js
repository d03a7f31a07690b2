const at = (id) => document.getElementById(id);
const say = (text) => { at("message").textContent = text; };
// Kept in memory only: a reload asks for the password again, and no other page can read it.
let token = null;

async function call(path, options = {}) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const response = await fetch(path, { ...options, headers });
  const body = await response.json();
  if (!response.ok) throw new Error(body.detail ?? body.reason ?? `status ${response.status}`);
  return body;
}

async function show() {
  const found = await call(`/api/employees?search=${encodeURIComponent(at("search").value)}`);
  at("rows").replaceChildren(...found.map((employee) => {
    const row = document.createElement("tr");
    const { first_name, last_name, department, position, email } = employee;
    for (const text of [`${last_name}, ${first_name}`, department, position, email]) {
      row.insertCell().textContent = text ?? "";
    }
    return row;
  }));
  say(`${found.length} found`);
}

at("login").addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    const answer = await call("/api/auth/login", { method: "POST", body: new URLSearchParams(new FormData(event.target)) });
    token = answer.access_token;
    event.target.hidden = true;
    at("employees").hidden = false;
    await show();
  } catch (problem) {
    say(problem.message);
  }
});

at("search").addEventListener("input", () => show().catch((problem) => say(problem.message)));

call("/health")
  .then((health) => { at("version").textContent = health.version; })
  .catch((problem) => say(problem.message));
