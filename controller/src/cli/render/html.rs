//! A report as one HTML file without anything from elsewhere.

use std::fmt::Write as _;

use super::report::Block;

/// Colours follow the reader's preference, and none of them carries a meaning.
const STYLE: &str = "
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; }
h2 { font-size: 1.25rem; margin-top: 2.2rem; border-bottom: 1px solid #8886; }
h3 { font-size: 1.05rem; margin-top: 1.6rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin: .6rem 0; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem; }
tr { border-bottom: 1px solid #8884; }
td { min-width: 4rem; }
td:last-child { overflow-wrap: anywhere; }
th[scope=row] { width: 12rem; }
pre { padding: .8rem; border: 1px solid #8884; overflow-x: auto; font-size: 13px; }
@media print {
  body { margin: 0; max-width: none; }
  h2, h3 { break-after: avoid; }
  tr { break-inside: avoid; }
}
";

/// Writes blocks down as a page.
pub(crate) fn html(blocks: &[Block]) -> String {
    let title = blocks.iter().find_map(|block| match block {
        Block::Heading(1, title) => Some(title.as_str()),
        _ => None,
    });
    let mut page = String::new();
    let _ = write!(
        page,
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta http-equiv=\"Content-Security-Policy\" \
         content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <title>{}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n",
        escape(title.unwrap_or("Report"))
    );
    for block in blocks {
        write_block(&mut page, block);
    }
    page.push_str("</main>\n</body>\n</html>\n");
    page
}

fn write_block(page: &mut String, block: &Block) {
    match block {
        Block::Heading(level, title) => {
            let _ = writeln!(page, "<h{level}>{}</h{level}>", escape(title));
        }
        Block::Fields(fields) => {
            page.push_str("<div class=\"wide\"><table>\n");
            for (name, value) in fields {
                let (name, value) = (escape(name), escape(value));
                let _ = writeln!(
                    page,
                    "<tr><th scope=\"row\">{name}</th><td>{value}</td></tr>"
                );
            }
            page.push_str("</table></div>\n");
        }
        Block::Table { head, rows } => {
            page.push_str("<div class=\"wide\"><table>\n<thead><tr>");
            for cell in head {
                let _ = write!(page, "<th scope=\"col\">{}</th>", escape(cell));
            }
            page.push_str("</tr></thead>\n<tbody>\n");
            for row in rows {
                page.push_str("<tr>");
                for cell in row {
                    let _ = write!(page, "<td>{}</td>", escape(cell));
                }
                page.push_str("</tr>\n");
            }
            page.push_str("</tbody>\n</table></div>\n");
        }
        Block::Lines(lines) => {
            let _ = writeln!(page, "<pre>{}</pre>", escape(lines.trim_end()));
        }
    }
}

fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_hosts_wrote_is_text_and_nothing_else() {
        let hostile = "<script>alert('x')</script>\" onload=\"y & z";
        let page = html(&[
            Block::Heading(1, hostile.into()),
            Block::Fields(vec![(hostile.into(), hostile.into())]),
            Block::Table {
                head: vec!["A"],
                rows: vec![vec![hostile.into()]],
            },
            Block::Lines(hostile.into()),
        ]);
        assert!(
            !page.contains("<script") && !page.contains("\" onload"),
            "{page}"
        );
        assert_eq!(page.matches("&lt;script&gt;").count(), 6);
    }
}
