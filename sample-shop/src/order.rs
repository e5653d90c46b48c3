//! The order service: accepts orders, returns, supplies and closings, and runs their sagas.

mod aggregate;
mod books;
mod closing;
mod line;
mod participant;
mod repositories;
mod returns;
mod supply;

pub use self::{
    aggregate::{Order, OrderCommand, OrderEvent},
    books::OrderBooks,
    closing::{Closing, ClosingCommand, ClosingEvent, NotOpened, ShopBooks},
    line::{CURRENCY, LINES_MAX, Line, OrderRefusal, PRICE_DECIMALS_MAX, units},
    participant::{BY_CUSTOMER, OrderParticipant, OrderStep},
    repositories::{Repositories, request},
    returns::{Return, ReturnCommand, ReturnEvent},
    supply::{CHANGES_MAX, Supply, SupplyEvent, SupplyRefusal, UNITS_MAX},
};
