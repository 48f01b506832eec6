// What stands in #planted beside plain elements with the attributes they need.
const found = [];
const walker = document.createTreeWalker(document.querySelector("#planted"), NodeFilter.SHOW_ELEMENT);
for (let one = walker.nextNode(); one; one = walker.nextNode()) {
  const icon = one.closest("svg.icon, button.icon-button"); // of our own copy buttons
  if (icon) continue;
  for (const { name, value } of one.attributes) {
    const ours =
      one.matches("div.code, div.code-head, div.table, pre") &&
      ["class", "tabindex", "role", "aria-label"].includes(name);
    const link =
      one.matches("a") && ["rel", "target"].includes(name) && /^(noopener noreferrer nofollow|_blank)$/.test(value);
    const language = one.matches("pre > code") && name === "class" && /^language-[\w+#.-]+$/.test(value);
    const address = name === "href" && /^(https?|mailto):/i.test(value);
    const plain =
      ["title", "align", "start", "checked", "disabled"].includes(name) || (name === "type" && value === "checkbox");
    if (!(ours || link || language || address || plain)) found.push(`${one.tagName} ${name}=${value}`);
  }
  if (one.matches("a") && !(one.rel.includes("noopener") && one.target === "_blank")) found.push("a link without rel");
  if (
    one.matches(
      "script,style,img,svg,math,iframe,object,embed,form,button,link,meta,base,details,audio,video,template,textarea,select",
    )
  )
    found.push(one.tagName);
}
return found;
