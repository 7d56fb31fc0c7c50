//! Ids equal those of transformers, for real tokenizers under the templates that fit them, and no
//! message can write a control token of any of them.
//!
//! The goldens are made by `make.py`; `README.md` has the table. What needs no download runs
//! everywhere: the corpus' own tokenizer against `small.json`. The rest takes its folder from
//! `HONE_PARITY`.

mod cells;
mod forgery;
mod golden;
mod ids;
