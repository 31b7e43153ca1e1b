//! The frozen language model behind one enum.
