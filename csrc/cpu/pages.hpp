#pragma once

#include "ops/pages.hpp"

namespace foretoken::cpu {

void edit_pages(const EditPagesArgs& args);
void keep_rows(const KeepRowsArgs& args);
void keep_apart(const KeepApartArgs& args);
void gather_apart(const GatherApartArgs& args);
void copy_pages(const CopyPagesArgs& args);

}  // namespace foretoken::cpu
