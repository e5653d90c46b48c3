//! The sample shop, as a library that its binary and its tests share.

pub mod arguments;
pub mod input;
pub mod report;
