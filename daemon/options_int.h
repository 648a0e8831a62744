/* options_int.h: what the files of options share. */
#ifndef ATTN_DAEMON_OPTIONS_INT_H
#define ATTN_DAEMON_OPTIONS_INT_H

#include "daemon/options.h"

#define OPTIONS_LINE_MAX 196u /* bytes of a line of a config file that inih reads whole */

#define OPTIONS_VALUE_MAX 320 /* bytes of any value as text */

/** Set the row's field from text. @return ATTN_ERR_INVALID: the sentence begins with the text */
attn_status_t option_set_value(const option_t *row, void *values, const char *text);

/** The row's field as text that option_set_value() takes. */
void option_get_value(const option_t *row, const void *values, char text[OPTIONS_VALUE_MAX]);

/** "HOST:PORT", "MS": what stands for the value in help; "" of a switch. */
const char *option_value_name(const option_t *row);

/** "integer, 0 to 1024": what may be written. */
void option_describe_kind(const option_t *row, char text[OPTIONS_VALUE_MAX]);

/** The row of that name, or NULL with a sentence that names the nearest one. prefix is "--" or "".
 */
const option_t *option_find(const option_set_t *set, const char *name, const char *prefix);

#endif
