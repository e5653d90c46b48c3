//! The inventory service: keeps the stock of each SKU.

mod books;
mod participant;
mod shelf;
mod stock;

pub use self::{
    books::{StockBooks, UnitTotals},
    participant::{InventoryParticipant, InventoryStep},
    shelf::{Level, Shelf, shelf},
    stock::{Change, OfSku, Stock, StockCommand, StockEvent, StockRefusal, Units, bookings},
};
