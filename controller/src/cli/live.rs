//! The last lines of a terminal while a rollout runs: bars for steps that say how far they are,
//! and one line for what is waited for. Elsewhere there is no such thing, and only lines are said.

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::printer::Printer;
use super::render::Line;
use super::render::progress::Bar;

/// More bars than this would push what was said off a small screen.
const MOST_BARS: usize = 6;

/// The area.
pub(crate) struct Live {
    printer: Printer,
    shown: Option<Shown>,
}

struct Shown {
    all: MultiProgress,
    waiting: ProgressBar,
    bars: Vec<ProgressBar>,
}

impl Live {
    pub(crate) fn new(printer: Printer) -> Self {
        let shown = printer.is_live().then(|| {
            // Four times in a second is smooth enough, and kind to slow lines.
            let all = MultiProgress::with_draw_target(ProgressDrawTarget::stderr_with_hz(4));
            let waiting = all.add(ProgressBar::new_spinner());
            waiting.set_style(style("{wide_msg}"));
            Shown {
                all,
                waiting,
                bars: vec![],
            }
        });
        Self { printer, shown }
    }

    /// How many bars there is room for.
    pub(crate) fn room() -> usize {
        MOST_BARS
    }

    /// Says lines above the area.
    pub(crate) fn say(&self, lines: &[Line]) {
        match &self.shown {
            None => self.printer.talk(lines),
            Some(shown) => shown.all.suspend(|| self.printer.talk(lines)),
        }
    }

    /// Draws the area anew.
    pub(crate) fn draw(&mut self, bars: &[Bar], waiting: &str) {
        let Some(shown) = &mut self.shown else { return };
        while shown.bars.len() > bars.len() {
            if let Some(bar) = shown.bars.pop() {
                bar.finish_and_clear();
                shown.all.remove(&bar);
            }
        }
        while shown.bars.len() < bars.len() {
            let bar = ProgressBar::new(1000);
            bar.set_style(style("  {prefix:36} [{bar:24}] {percent:>3}% {wide_msg}"));
            shown
                .bars
                .push(shown.all.insert_before(&shown.waiting, bar));
        }
        for (line, bar) in shown.bars.iter().zip(bars) {
            line.set_prefix(bar.label.clone());
            line.set_message(bar.message.clone());
            line.set_position(u64::from(bar.permille));
        }
        shown.waiting.set_message(waiting.to_owned());
        shown.waiting.tick();
    }

    /// Takes the area off the screen.
    pub(crate) fn clear(&mut self) {
        if let Some(shown) = self.shown.take() {
            for bar in &shown.bars {
                bar.finish_and_clear();
            }
            shown.waiting.finish_and_clear();
            let _ = shown.all.clear();
        }
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.clear();
    }
}

fn style(template: &str) -> ProgressStyle {
    let style = ProgressStyle::with_template(template).expect("the template is a constant");
    style.progress_chars("#> ")
}
