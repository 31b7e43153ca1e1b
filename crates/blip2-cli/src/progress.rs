//! A bar on standard error while something long goes on; a plain line where nobody watches.

use std::io::{IsTerminal as _, Write as _};

use indicatif::{ProgressBar, ProgressStyle};

/// Shows how far a download or a build is. One bar per name, in the order they come.
pub(crate) struct Progress {
    unit: Unit,
    shown: Option<(String, ProgressBar)>,
}

/// What a bar counts.
#[derive(Clone, Copy)]
enum Unit {
    Bytes,
    Pictures,
}

impl Progress {
    /// Bars that count bytes.
    pub(crate) fn bytes() -> Self {
        Self { unit: Unit::Bytes, shown: None }
    }

    /// Bars that count pictures.
    pub(crate) fn pictures() -> Self {
        Self { unit: Unit::Pictures, shown: None }
    }

    /// `done` of `total` of `name`; a total of 0 means unknown.
    pub(crate) fn update(&mut self, name: &str, done: u64, total: u64) {
        if self.shown.as_ref().is_none_or(|(shown, _)| shown != name) {
            self.finish();
            self.shown = Some((name.to_owned(), begin(name, total, self.unit)));
        }
        if let Some((_, bar)) = &self.shown {
            bar.set_position(done);
        }
    }

    fn finish(&mut self) {
        if let Some((_, bar)) = self.shown.take() {
            bar.finish();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.finish();
    }
}

fn begin(name: &str, total: u64, unit: Unit) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        say(&format!("{name} …"));
        return ProgressBar::hidden();
    }
    let bar = if total == 0 { ProgressBar::new_spinner() } else { ProgressBar::new(total) };
    let template = match (unit, total) {
        (Unit::Bytes, 0) => "{msg} {bytes}",
        (Unit::Bytes, _) => "{msg} {wide_bar} {bytes}/{total_bytes} {eta}",
        (Unit::Pictures, 0) => "{msg} {pos}",
        (Unit::Pictures, _) => "{msg} {wide_bar} {pos}/{len} {eta}",
    };
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.set_message(name.to_owned());
    bar
}

/// One line of what is going on, or of what is wrong.
pub(crate) fn say(line: &str) {
    // Nobody to tell is no reason to stop, let alone to panic as `eprintln!` does.
    let _ = writeln!(std::io::stderr(), "{line}");
}
