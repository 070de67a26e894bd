// Fills the list of versions in the sidebar. The site publishes each version in a folder of its own, and their names in
// versions.json beside these folders. Without that file, as in a build that is looked at locally, there is no list.
document.addEventListener("DOMContentLoaded", async () => {
  const place = document.querySelector(".versions");
  if (!place || !location.protocol.startsWith("http")) return;
  const root = new URL(place.dataset.root, location.href); // of this version
  const answer = await fetch(new URL("../versions.json", root)).catch(() => null);
  if (!answer || !answer.ok) return;
  const select = document.createElement("select");
  select.ariaLabel = "Version of this documentation";
  for (const name of await answer.json()) {
    select.add(new Option(name, name, false, root.pathname.endsWith(`/${name}/`)));
  }
  select.addEventListener("change", async () => {
    const other = new URL(`../${select.value}/`, root);
    const page = new URL(location.pathname.slice(root.pathname.length), other);
    const there = await fetch(page, { method: "HEAD" }).catch(() => null);
    location.href = there && there.ok ? page : other; // that version may not have this page
  });
  place.append(select);
});
