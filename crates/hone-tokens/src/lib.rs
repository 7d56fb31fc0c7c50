//! From rendered text to packs: token ids, loss weights, and the proof that they are what they should be. No I/O here.
//!
//! - [`Vocab`]: a tokenizer that knows which bytes the template wrote. An added token is taken as one token only there;
//!   inside a message the same bytes become ordinary text, so no row can forge a control token. On rows that spell no
//!   such token the ids are those of the reference implementation.
//! - [`tokenize`]: a row's ids and the weight of each token's loss under a [`Rules`]: what is trained by its [`Policy`], what
//!   becomes of a row that is too long by [`TooLong`]. Certified, or refused by [`Reason`].
//! - [`pack`]: documents into packs by their lengths, none lost and none twice.
//! - [`prompt_of`]: what a model is asked, and what it should say, for evaluation.
//! - [`look`]: the same before it is judged, with the spans behind each token, for whoever asks why.
//! - [`train_vocab`]: a byte-level BPE vocabulary from texts.

mod added;
mod bpe;
mod certificate;
mod cut;
mod encode;
mod fast;
mod look;
mod mask;
mod pack;
mod policy;
mod prompt;
mod role;
mod row;
mod thought;
mod vocab;

pub use bpe::{VocabSpec, VocabSpecError, train_vocab};
pub use cut::{Keep, TooLong};
pub use encode::{EncodeError, Encoded};
pub use look::{Look, look};
pub use pack::{Bins, Packing, by_length, pack, padding_share};
pub use policy::{Learn, Policy, TrainOn, TrainOnStop};
pub use prompt::{PromptIds, prompt_of};
pub use row::{Counts, Reason, Refusal, Row, Rules, Taken, tokenize};
pub use vocab::{DecodeError, Vocab, VocabError};
