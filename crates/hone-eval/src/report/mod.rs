//! `report.html` and the table on the terminal.
//!
//! | file | holds |
//! |---|---|
//! | `html` | escaping, and numbers as people read them |
//! | `page` | the page, from top to bottom |
//! | `curve` | the loss curve as inline SVG |
//! | `samples` | which prompts are shown, and how |
//! | `terminal` | the table on stderr |
//! | `style.css` | the looks: light and dark, wide and narrow |

mod curve;
mod html;
mod page;
mod samples;
mod terminal;

pub(crate) use html::percent;
pub(crate) use page::Page;
pub(crate) use samples::choose;
pub(crate) use terminal::{failed_gates, table};

/// Drawn answers to the first of the shown prompts.
pub(crate) type Drawn = Vec<crate::answers::Answer>;
