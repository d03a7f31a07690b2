// Copies src/ to dist/. Each asset gets its content's hash into its name, and the page the new names: what a browser
// keeps for a year is never out of date.
import { createHash } from "node:crypto";
import { mkdirSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const here = dirname(fileURLToPath(import.meta.url));
const fresh = join(here, "dist.new");
const dist = join(here, "dist");

rmSync(fresh, { recursive: true, force: true });
mkdirSync(join(fresh, "assets"), { recursive: true });

let page = readFileSync(join(here, "src", "index.html"), "utf8");
for (const name of ["app.js", "style.css"]) {
  const content = readFileSync(join(here, "src", name));
  const hash = createHash("sha256").update(content).digest("hex").slice(0, 12);
  const hashed = name.replace(".", `.${hash}.`);
  if (!page.includes(`"/assets/${name}"`)) throw new Error(`index.html does not use ${name}`);
  page = page.replaceAll(`"/assets/${name}"`, `"/assets/${hashed}"`);
  writeFileSync(join(fresh, "assets", hashed), content);
}
writeFileSync(join(fresh, "index.html"), page);

// A build that is broken off leaves the old dist/ as it was.
rmSync(dist, { recursive: true, force: true });
renameSync(fresh, dist);
console.log("built dist/");
